"""Lesions in masks: which are asked for, how large they came out, moved ones for variety, and new ones in healthy organs.

All functions are pure and work on the lesion's own box, so that their cost does not grow with the volume. What
is random comes from a seed alone, and every search ends after `max_tries`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from .anatomy import BODY, fold, maisi
from .envelope import dilate, erode
from .errors import UsageError, unknown
from .repair import (
    BONE_LESION,
    COLON_TUMOR,
    LIVER_TUMOR,
    LUNG_TUMOR,
    PANCREATIC_TUMOR,
    Bits,
    Box,
    Labels,
    among,
    bounds,
    checked,
    fill,
    grown,
    hosts,
    ring_lobe,
)
from .volumes import Mask

if TYPE_CHECKING:
    from monai.transforms import Transform

Unit = Literal["mm", "ml", "relative"]
Triple = tuple[float, float, float]

MAX_TRIES, MAX_TRIES_COMPAT = 100, 1000
LARGEST_MM = 200.0
RELATIVE_MAX: Mapping[int, float] = {LUNG_TUMOR: 5.61, PANCREATIC_TUMOR: 16.5, LIVER_TUMOR: 6.25, COLON_TUMOR: 5.14, BONE_LESION: 6.31}
"""The largest relative size of each tumour among the size vectors that the mask networks were trained with (1.11)."""


# --- what is asked for ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One tumour that is asked for: its label, the labels it may lie in, and its size.

    `amount` is an equivalent diameter in mm, a volume in ml, or the mask networks' relative size (`unit`).
    """

    tumor: int
    hosts: tuple[int, ...]
    amount: float
    unit: Unit

    @property
    def name(self) -> str:
        """The tumour's name."""
        return maisi().name_of(self.tumor)

    @property
    def volume_ml(self) -> float | None:
        """The volume that is asked for, a diameter being taken as that of a ball; None for a relative size."""
        if self.unit == "relative":
            return None
        return self.amount if self.unit == "ml" else math.pi / 6 * self.amount**3 / 1000

    def miss(self, lesion: Lesion) -> float | None:
        """Return how far a lesion is from what was asked, 0.25 for a quarter too large or small; None for a relative size.

        A request in mm is held against the diameter, one in ml against the volume. A lesion that is not there is 1 away.
        """
        if self.unit == "relative":
            return None
        made = lesion.diameter_mm if self.unit == "mm" else lesion.volume_ml
        return abs(made / self.amount - 1)

    def __str__(self) -> str:
        size = f"={self.amount:g}" if self.unit == "relative" else f":{self.amount:g}{self.unit}"
        return f"{self.name}{size}"


def parse_request(text: str) -> Request:
    """Read a request such as `liver:15mm`, `lung:2.5ml` or `hepatic tumor=0.3` (a relative size).

    An organ stands for its tumour, and one part of it (`right lung lower lobe`, `vertebrae L3`) narrows the host.
    Raises `UsageError`, with near matches, for an organ without a tumour class, a size that cannot be, or several tumours.
    """
    example = "write it like liver:15mm, lung:2.5ml or 'hepatic tumor=0.3'"
    if re.search(r"[,;+]", text):
        raise UsageError(f"{text!r} asks for several tumours, and the networks know masks with one", hint=f"ask for one: {example}")
    found = re.fullmatch(r"\s*(?P<name>[^:=]+?)\s*[:=]\s*(?P<size>.+?)\s*", text)
    if not found:
        raise UsageError(f"the tumour {text!r} has no size", hint=example)
    tumor, host = _target(found["name"])
    amount, unit = _size(found["size"], tumor, text, example)
    return Request(tumor=tumor, hosts=host, amount=amount, unit=unit)


def only_request(texts: Iterable[str]) -> Request | None:
    """Read the requests of a run: None without any, and `UsageError` for more than one."""
    given = [text for text in texts if text.strip()]
    if len(given) > 1:
        raise UsageError(f"{len(given)} tumours are asked for, and the networks know masks with one", hint=f"keep one, such as {given[0]!r}")
    return parse_request(given[0]) if given else None


def _target(name: str) -> tuple[int, tuple[int, ...]]:
    vocabulary = maisi()
    targets = _targets()
    wanted = fold(name)
    wanted = fold(vocabulary.aliases.get(wanted, wanted))
    if wanted.isdecimal():
        wanted = fold(vocabulary.name_of(int(wanted)))
    if wanted in targets:
        return targets[wanted]
    known = {fold(label.name) for label in vocabulary.labels if label.group != "dummy"} | {"kidney", "kidneys", "kidney mass"}
    if wanted in known or fold(name) in known:
        raise UsageError(f"no tumour of {name.strip()!r} can be made: MAISI has no class for it",
                         hint="tumours lie in the lung, pancreas, liver, colon or bone")  # fmt: skip
    raise unknown("tumour or organ with a tumour", name.strip(), targets, see="maisi labels list")


def _targets() -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return all that can be asked for by name: tumours, their hosts, and groups of hosts."""
    vocabulary = maisi()
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for label in vocabulary.tumors():
        for host in hosts(label.id):
            found[fold(vocabulary.name_of(host))] = (label.id, (host,))
    for side in ("left", "right"):
        lobes = tuple(id for id in vocabulary.ids("lung") if vocabulary.name_of(id).startswith(side))
        found[f"{side} lung"] = (LUNG_TUMOR, lobes)
    found["lung"] = found["lungs"] = (LUNG_TUMOR, hosts(LUNG_TUMOR))
    found["bone"] = found["bones"] = (BONE_LESION, hosts(BONE_LESION))
    found["spine"] = (BONE_LESION, vocabulary.ids("spine"))
    found["ribs"] = (BONE_LESION, vocabulary.ids("rib"))
    for label in vocabulary.tumors():
        found[fold(label.name)] = (label.id, hosts(label.id))
    return found


def _size(size: str, tumor: int, text: str, example: str) -> tuple[float, Unit]:
    found = re.fullmatch(r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[^\d\s.]*)", size)
    if not found:
        raise UsageError(f"{size!r} in {text!r} is not a size", hint=example)
    amount, unit = float(found["number"]), found["unit"].casefold()
    scale: dict[str, tuple[float, Unit]] = {"": (1, "relative"), "mm": (1, "mm"), "cm": (10, "mm"), "ml": (1, "ml"),
                                            "cc": (1, "ml"), "cm3": (1, "ml"), "cm³": (1, "ml"), "mm3": (1e-3, "ml")}  # fmt: skip
    if unit not in scale:
        raise UsageError(f"{found['unit']!r} in {text!r} is no unit of a tumour's size",
                         hint="use mm or cm for its diameter, ml for its volume, or a bare number for its relative size")  # fmt: skip
    factor, kind = scale[unit]
    amount *= factor
    if not (math.isfinite(amount) and amount > 0):
        raise UsageError(f"the tumour in {text!r} has no positive size", hint="leave the tumour out for a mask without one")
    if kind == "relative":
        largest = RELATIVE_MAX.get(tumor, 1.0)
        if amount > largest:
            raise UsageError(f"a relative size of {amount:g} is beyond {largest:g}, the largest that the networks saw",
                             hint=f"add a unit, such as {amount:g}mm, or stay below {largest:g}")  # fmt: skip
    else:
        limit = LARGEST_MM if kind == "mm" else math.pi / 6 * LARGEST_MM**3 / 1000
        if amount > limit:
            raise UsageError(f"a tumour of {amount:g} {kind} is too large", hint=f"ask for at most {limit:.4g} {kind}")
    return amount, kind


# --- what is there --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesion:
    """What a mask holds of one tumour; all zero, and without a host, when it holds none.

    `diameter_mm` is that of a ball as large as the largest of its `components` (voxels that touch by a corner
    are connected). `host` is the label that surrounds most of it, one of its proper hosts if any does.
    `overlap` is the share of its voxels that lie in a proper host: those whose nearest other voxel is host.
    """

    tumor: int
    volume_ml: float
    diameter_mm: float
    components: int
    host: int | None
    overlap: float


def measure(mask: Mask, tumor: int) -> Lesion:
    """Measure the tumour of this label in a mask. Raises `UsageError` for a label that is no lesion."""
    host = hosts(tumor)
    if not host:
        raise UsageError(f"label {tumor} ({maisi().name_of(tumor)}) is no tumour", hint="see  maisi labels list")
    lesion = mask.array == tumor
    box = bounds(lesion, margin=1)
    if box is None:
        return Lesion(tumor=tumor, volume_ml=0.0, diameter_mm=0.0, components=0, host=None, overlap=0.0)
    view, lesion = mask.array[box], lesion[box]
    parts, number = ndimage.label(lesion, structure=np.ones((3, 3, 3), dtype=bool))
    sizes = np.bincount(parts.ravel())[1:]
    voxel_ml = math.prod(mask.geometry.spacing) / 1000
    surround, overlap = _surroundings(view, lesion, host, mask.geometry.spacing)
    return Lesion(
        tumor=tumor, volume_ml=float(sizes.sum() * voxel_ml), diameter_mm=_diameter(float(sizes.max() * voxel_ml)),
        components=int(number), host=surround, overlap=overlap,
    )  # fmt: skip


def _surroundings(labels: Labels, lesion: Bits, host: Sequence[int], spacing: Triple) -> tuple[int | None, float]:
    """Return the label that surrounds most of a lesion, and the share of the lesion that lies in `host`."""
    ring = dilate(lesion, 3) & ~lesion
    if not ring.any():
        return None, 0.0
    around = labels[ring]
    counts = np.bincount(around, minlength=256)
    proper = counts[list(host)]
    if proper.any():
        surround = host[int(proper.argmax())]
    else:
        counts[0] = 0
        organs = counts.copy()
        organs[BODY] = 0
        surround = int(organs.argmax()) if organs.any() else (BODY if counts[BODY] else None)
    # the voxel nearest to a lesion's voxel, of all that are not lesion, lies in its ring
    _, nearest = KDTree(np.argwhere(ring) * np.asarray(spacing)).query(np.argwhere(lesion) * np.asarray(spacing))
    return surround, float(among(around, host)[nearest].mean())


def _diameter(volume_ml: float) -> float:
    return (6 * volume_ml * 1000 / math.pi) ** (1 / 3)


# --- moved for variety ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmented:
    """A mask changed for variety: which tumours moved, after how many tries in all, or by how much the body was zoomed.

    A tumour of `stayed` found no place and is where it was, unchanged. With `compat` the reference would also
    have changed the affine by `zoom`; the mask stays on its grid.
    """

    labels: Labels
    moved: tuple[int, ...] = ()
    stayed: tuple[int, ...] = ()
    tries: int = 0
    zoom: float = 1.0


def augment(
    labels: Labels, *, seed: int, spacing_mm: Triple = (1.0, 1.0, 1.0), max_tries: int | None = None, compat: bool = False
) -> Augmented:
    """Move and deform each tumour of a mask within its organ; zoom a mask without any by up to a hundredth.

    Each piece of a tumour is turned, scaled, bent and shifted on its own, and is kept where most of it lies in
    its organ; it then takes only voxels of the organ and its own. What it leaves becomes the organ around it.
    Volumes stay within a factor of 2. Nothing else changes, and no tumour is added. The same seed gives the
    same mask. A piece that finds no place in `max_tries` (100) stays.

    With `compat` as the reference does (2.8), on the CPU and through MONAI: one tumour of the first kind found,
    as a whole, anywhere within the closing of its organ. `seed` seeds its transforms; after `max_tries` (1000)
    the tumour stays, where the reference would loop for ever.
    """
    labels = checked(labels)
    if compat:
        return _reference(labels, seed, max_tries or MAX_TRIES_COMPAT)
    rng = np.random.default_rng(seed)
    present = [label.id for label in maisi().tumors() if hosts(label.id) and (labels == label.id).any()]
    if not present:
        zoom = float(rng.uniform(0.99, 1.01))
        return Augmented(labels=_zoomed(labels, zoom), zoom=zoom)
    result, tries = labels.copy(), 0
    moved: list[int] = []
    for tumor in present:
        count, done = _move_all(result, tumor, rng, spacing_mm, max_tries or MAX_TRIES)
        tries += count
        if done:
            moved.append(tumor)
    return Augmented(labels=result, moved=tuple(moved), stayed=tuple(t for t in present if t not in moved), tries=tries)
