"""Where masks come from: a file of the user's, the mask database, the mask diffusion, or the procedural phantom.

A source is a function `source(settings, geometry, seed) -> Mask`, registered by name, or a class whose instances are
such functions (see `sources`); the mask is in the MAISI vocabulary, on a grid of its own (file) or on `geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..anatomy import BODY, maisi, regions_of, remap_table
from ..catalog import ModelSpec
from ..errors import UsageError
from ..events import Note, OnEvent, ignore
from ..geometry import Geometry
from ..labelfile import RENUMBERED, asked_for
from ..lesions import NoRoom, place
from ..repair import lesions_of, without_lesions
from ..seeds import derive
from ..settings import GenerateSettings
from ..volumes import Mask, pad, read_mask
from .fitting import fit, suggested
from .sources import Made, NoMask, Source, choose, open_source
from .tumors import Best, aim_of

__all__ = ["Conditioned", "Made", "NoMask", "Source", "choose", "conditioned", "from_file", "load_mask", "map_labels", "open_source", "own",
           "painted", "phantom", "renumbered"]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioned:
    """A mask, the same on the grid on which the networks are `shown` it, and the body regions that it shows.

    `hidden` are the lesions that the networks never saw, and are shown the organ instead of.
    """

    mask: Mask
    shown: Mask
    hidden: tuple[int, ...] = ()
    top_region: int | None = None
    bottom_region: int | None = None


def from_file(settings: GenerateSettings, geometry: Geometry | None, seed: int, *, on_event: OnEvent = ignore) -> Mask:
    """Read the user's mask and map it to the MAISI vocabulary (`labels` names the vocabulary that it is in).

    Raises `UsageError` when label 200 (body) is missing, unless `allow_missing_body`, and for ids that are unknown.
    """
    if not settings.mask:
        raise UsageError("--mask-source file needs a mask", hint="add --mask FILE")
    return load_mask(Path(settings.mask), labels=settings.labels, allow_missing_body=settings.allow_missing_body, on_event=on_event)


def own(settings: GenerateSettings, *, spec: ModelSpec | None = None, on_event: OnEvent = ignore) -> Mask:
    """Read the user's mask as `from_file` does, and refuse one without an organ of `settings.anatomy`.

    For `settings.tumor` it must be free of tumours: `painted` adds the one that is asked for.

    In compatibility a mask on a grid that the model `spec` does not take is resampled to one that it takes, which is said.
    """
    mask = from_file(settings, None, 0, on_event=on_event)
    present = mask.ids()
    missing = [name for name in settings.anatomy if maisi().id(name) not in present]
    if missing:
        raise UsageError(f"{settings.mask} has no {', '.join(missing)}", hint="leave it out of --anatomy, or give another mask")
    there = [tumor.name for tumor in maisi().tumors() if tumor.id in present]
    if settings.tumor and there:
        raise UsageError(f"{settings.mask} has a {there[0]} already, and the networks know masks with one tumour",
                         hint="leave --tumor out, or take it out of the mask first")  # fmt: skip
    aim_of(settings)
    if settings.compat == "reference" and spec is not None and spec.limits.size_xy:
        target = suggested(mask.geometry, spec)
        if target != mask.geometry:
            text = f"{settings.mask} is resampled from {mask.geometry} to {target}, as the reference does"
            on_event(Note(text=text, level="warning"))
            return fit(mask, target, compat=True)
    return mask


def load_mask(path: Path, *, labels: str = "maisi", allow_missing_body: bool = False, on_event: OnEvent = ignore) -> Mask:
    """Read a mask, map it from the vocabulary `labels`, and check that it can condition a network."""
    mask = read_mask(path, on_event=on_event)
    has_body = remap_table(labels).has_body(mask.ids())  # as it comes: what has no partner becomes 200, and is no envelope
    if labels != "maisi":
        mask = map_labels(mask, labels, "maisi", on_event=on_event)
    if not mask.ids():
        raise UsageError(f"{path} holds no label at all", hint="give a mask that is not empty; see  maisi info FILE")
    unknown = [value for value in mask.ids() if value not in maisi()]
    if unknown:
        raise UsageError(f"{path} holds ids that MAISI does not have: {', '.join(map(str, unknown[:8]))}",
                         hint="name its vocabulary, such as --labels totalsegmentator, or see  maisi labels check FILE")  # fmt: skip
    if not has_body and not allow_missing_body:
        raise UsageError(f"{path} has no body envelope (label {BODY}), without which images lose their quality",
                         hint=f"maisi labels add-body {path} NEW.nii.gz --ct CT.nii.gz, or --allow-missing-body")  # fmt: skip
    return mask


def map_labels(mask: Mask, source: str, target: str = "maisi", *, on_event: OnEvent = ignore) -> Mask:
    """Return the mask in another vocabulary; what has no partner becomes body (200), and is said.

    An envelope that is there already (200, where the source calls nothing else so) stays.
    """
    remap = remap_table(source, target)
    kept = {BODY} if target == "maisi" and BODY not in remap.names else set()
    lost = {value: name for value, name in remap.unmapped(mask.ids()).items() if value not in kept}
    table = np.array(remap.table(other=BODY if target == "maisi" else 0), dtype=np.uint8)
    if target == "maisi":
        table[BODY] = remap.pairs.get(BODY, BODY)
    if lost:
        names = ", ".join(f"{value} {name}" for value, name in list(lost.items())[:6])
        became = "body (200)" if target == "maisi" else "background"
        have, become = ("label has", "becomes") if len(lost) == 1 else ("labels have", "become")
        on_event(Note(text=f"{len(lost)} {have} no partner in {target} and {become} {became}: {names}", level="warning"))
    return Mask(array=table[mask.array], geometry=mask.geometry, vocabulary=target)


def painted(mask: Mask, settings: GenerateSettings, seed: int) -> Made:
    """Return a mask with the tumour that the settings ask for painted into its organ, and what the record says of it.

    Without such a request the mask stays as it is. Raises `UsageError` for a mask without that organ, a relative size, and a
    tumour that fits nowhere.
    """
    aim = aim_of(settings)
    if aim is None or aim.request is None:
        return Made(mask=mask)
    labels = place(mask.array, aim.request, seed=derive(seed, 0, 0, "tumour"), spacing_mm=mask.geometry.spacing)
    best = Best(aim=aim)
    best.offer(replace(mask, array=labels), {})
    assert best.mask is not None
    return Made(mask=best.mask, about=best.record())


def phantom(settings: GenerateSettings, geometry: Geometry | None, seed: int, *, on_event: OnEvent = ignore) -> Made:
    """Paint a procedural body on `geometry` that shows the settings' regions and holds the requested organs.

    A tumour that is asked for by size is painted into its organ. Raises `UsageError` for what no phantom has, `NoMask` where
    this one has no room for the tumour.
    """
    from ..phantom import body

    if geometry is None:
        raise UsageError("the phantom needs a volume", hint="give --size and --spacing, or a --preset")
    wanted = [maisi().id(name) for name in settings.anatomy]
    never = [label for label in wanted if maisi().get(label).group in ("tumor", "cyst", "dummy")]  # type: ignore[union-attr]
    if never:
        raise UsageError(f"the phantom has no {maisi().name_of(never[0])} of its own",
                         hint="ask for one by size, such as --tumor liver:15mm, or give a mask that has it:  --mask FILE")  # fmt: skip
    mask = body(geometry, seed, regions=settings.regions or ("chest", "abdomen"))
    missing = [maisi().name_of(label) for label in wanted if label not in mask.ids()]
    if missing:
        raise UsageError(f"no {', '.join(missing)} in this volume of {', '.join(settings.regions)}",
                         hint="choose a --preset of the region it lies in, or a larger --fov")  # fmt: skip
    try:
        return painted(mask, settings, seed)
    except NoRoom as error:
        raise NoMask(error.message, hint=error.hint) from error


phantom.honours = from_file.honours = frozenset({"tumor"})  # type: ignore[attr-defined]


def renumbered(mask: Mask, settings: GenerateSettings) -> Mask:
    """Return the mask as the reference saves it: only what was asked for by name, numbered 1, 2, ... in that order.

    What is asked for are the names of `anatomy_size` where there are any, else those of `anatomy`; with neither the mask
    stays as it is.
    """
    numbering = asked_for(settings)
    if not numbering:
        return mask
    table = np.zeros(256, dtype=np.uint8)
    table[list(numbering)] = np.arange(1, len(numbering) + 1)
    return Mask(array=table[mask.array], geometry=mask.geometry, vocabulary=RENUMBERED, numbering=numbering)


def conditioned(mask: Mask, spec: ModelSpec) -> Conditioned:
    """Put a mask on the grid on which the model's networks are shown it (`ModelSpec.shown_on`)."""
    grid = spec.shown_on(mask.geometry)
    if grid == mask.geometry:
        shown_mask = mask
    elif grid.spacing == mask.geometry.spacing:
        shown_mask = pad(mask, grid.size, fill=0)
    else:
        shown_mask = fit(mask, grid)
    hidden = () if spec.lesions else lesions_of(shown_mask.array)
    if hidden:
        shown_mask = replace(shown_mask, array=without_lesions(shown_mask.array))
    regions = regions_of(mask.ids()) or (None, None)
    return Conditioned(mask=mask, shown=shown_mask, hidden=hidden, top_region=regions[0], bottom_region=regions[1])
