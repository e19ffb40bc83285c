"""Where masks come from: a file of the user's, the mask database, the mask diffusion, or the procedural phantom.

A source is a function `source(settings, geometry, seed) -> Mask`, registered by name, or a class whose instances are
such functions (see `sources`); the mask is in the MAISI vocabulary, on a grid of its own (file) or on `geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..anatomy import BODY, maisi, regions_of, remap_table
from ..catalog import ModelSpec
from ..errors import UsageError
from ..events import Note, OnEvent, ignore
from ..geometry import Geometry
from ..labelfile import RENUMBERED, asked_for
from ..settings import GenerateSettings
from ..volumes import Mask, pad, read_mask
from .fitting import fit, suggested
from .sources import Made, NoMask, Source, choose, open_source

__all__ = ["Conditioned", "Made", "NoMask", "Source", "choose", "conditioned", "from_file", "load_mask", "map_labels", "open_source", "own",
           "phantom", "renumbered"]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioned:
    """A mask as the networks take it: padded to their grid, with the body regions that it shows."""

    mask: Mask
    padded: Mask
    top_region: int | None
    bottom_region: int | None


def from_file(settings: GenerateSettings, geometry: Geometry | None, seed: int, *, on_event: OnEvent = ignore) -> Mask:
    """Read the user's mask and map it to the MAISI vocabulary (`labels` names the vocabulary that it is in).

    Raises `UsageError` when label 200 (body) is missing, unless `allow_missing_body`, and for ids that are unknown.
    """
    if not settings.mask:
        raise UsageError("--mask-source file needs a mask", hint="add --mask FILE")
    return load_mask(Path(settings.mask), labels=settings.labels, allow_missing_body=settings.allow_missing_body, on_event=on_event)


def own(settings: GenerateSettings, *, spec: ModelSpec | None = None, on_event: OnEvent = ignore) -> Mask:
    """Read the user's mask as `from_file` does, and refuse one without an organ of `settings.anatomy`.

    In compatibility a mask on a grid that the model `spec` does not take is resampled to one that it takes, which is said.
    """
    mask = from_file(settings, None, 0, on_event=on_event)
    present = mask.ids()
    missing = [name for name in settings.anatomy if maisi().id(name) not in present]
    if missing:
        raise UsageError(f"{settings.mask} has no {', '.join(missing)}", hint="leave it out of --anatomy, or give another mask")
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


def phantom(settings: GenerateSettings, geometry: Geometry | None, seed: int, *, on_event: OnEvent = ignore) -> Mask:
    """Paint a procedural body on `geometry` that shows the settings' regions and holds the requested organs."""
    from ..phantom import body

    if geometry is None:
        raise UsageError("the phantom needs a volume", hint="give --size and --spacing, or a --preset")
    wanted = [maisi().id(name) for name in settings.anatomy]
    never = [label for label in wanted if maisi().get(label).group in ("tumor", "cyst", "dummy")]  # type: ignore[union-attr]
    if never:
        raise UsageError(f"the phantom has no {maisi().name_of(never[0])}", hint="give a mask that has it:  --mask FILE")
    mask = body(geometry, seed, regions=settings.regions or ("chest", "abdomen"))
    missing = [maisi().name_of(label) for label in wanted if label not in mask.ids()]
    if missing:
        raise UsageError(f"no {', '.join(missing)} in this volume of {', '.join(settings.regions)}",
                         hint="choose a --preset of the region it lies in, or a larger --fov")  # fmt: skip
    return mask


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
    """Pad a mask to a grid that the model's networks take; nothing is resampled."""
    padded = mask
    if not spec.valid_size(mask.geometry.size):
        if not spec.limits.pads:
            spec.check(mask.geometry, modality=spec.modality, mode="paired", allow_ood=True)
        size = tuple(max(spec.limits.size_min, n) for n in mask.geometry.padded(spec.limits.multiple).size)
        padded = pad(mask, size, fill=0)  # type: ignore[arg-type]
    shown = regions_of(mask.ids())
    return Conditioned(mask=mask, padded=padded, top_region=shown[0] if shown else None, bottom_region=shown[1] if shown else None)
