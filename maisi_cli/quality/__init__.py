"""Quality checks: plain functions that look at an image and its mask and return findings.

A check is a function `check(image, mask, context) -> list[Finding]`; the built-in ones are registered through
the hook `register_checks` like anyone else's. A verdict passes when every finding does. `docs/quality.md` tells what
each looks at, within which bounds and on whose word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..volumes import Mask, Volume, require_same_grid
from .anatomy import chosen_organs, components, laterality, organ_volumes, organs_expected
from .findings import Check, Context, Finding, Planes, Verdict
from .hu import border_steps, clipped, follows_mask, hu_median, hu_steps
from .mr import mr_background, mr_contrast
from .plain import intensity, label_type, labels_known, organs_present
from .seams import seam, tile_planes
from .table import ct_table, parse_labels

__all__ = [
    "Check",
    "Context",
    "Finding",
    "Planes",
    "Verdict",
    "border_steps",
    "check",
    "chosen_organs",
    "clipped",
    "components",
    "ct_table",
    "follows_mask",
    "hu_median",
    "hu_steps",
    "intensity",
    "label_type",
    "labels_known",
    "laterality",
    "mr_background",
    "mr_contrast",
    "organ_volumes",
    "organs_expected",
    "organs_present",
    "parse_labels",
    "seam",
    "tile_planes",
]


def check(
    image: Volume | None,
    mask: Mask | None,
    *,
    checks: Sequence[str | Check] | None = None,
    required: Iterable[str | int] = (),
    chosen: Iterable[str | int] = (),
    own_mask: bool = False,
    tiles: Planes | None = None,
    stored: str | None = None,
    compat: bool = False,
) -> Verdict:
    """Run `checks`, names or functions (default: every registered one), on an image and its mask.

    `required` names the organs that must be present, `chosen` those whose size was asked for; `own_mask`, `tiles` and
    `stored` are as in `Context`. HU checks say nothing about an MR image. Of a mask without an image only those are run that need none:
    a verdict without findings says nothing. Raises `UsageError` for an unknown check or organ, and when image and mask
    lie on different grids.
    """
    from ..anatomy import maisi
    from ..plugins import plugins

    if image is not None and mask is not None:
        require_same_grid(image, mask)
    ids = maisi().id
    context = Context(required=tuple(map(ids, required)), compat=compat, chosen=tuple(map(ids, chosen)), own_mask=own_mask, tiles=tiles,
                      stored=stored)  # fmt: skip
    registry = plugins().registry("checks")
    names = registry.names() if checks is None else checks
    functions = [registry.get(one) if isinstance(one, str) else one for one in names]
    if image is None:
        functions = [one for one in functions if not getattr(one, "needs_image", True)]
    return Verdict(findings=tuple(finding for run in functions for finding in run(image, mask, context)))
