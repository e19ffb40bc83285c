"""Checks of the label map: volumes of organs, their pieces, their sides, and what is missing. None needs an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..anatomy import BODY, maisi
from ..volumes import Mask, Volume
from .findings import Context, Finding, judged
from .table import ct_table, membership

Box = tuple[slice, slice, slice]

LEAST_VOXELS = 64
"""An organ of fewer voxels is too coarse to be judged by its volume or its pieces."""
LEAST_ML = 0.5
"""What is smaller has no side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Where each label lies in a mask: `boxes` by id, voxel `counts`, the box of all that shows body, and ml per voxel."""

    labels: NDArray[np.uint8]
    boxes: tuple[Box | None, ...]
    counts: NDArray[np.int64]
    shown: Box
    voxel_ml: float
    mm_x: float

    @classmethod
    def of(cls, mask: Mask) -> Body:
        """Look at a mask."""
        found: list[Box | None] = [None, *ndimage.find_objects(mask.array, max_label=255)]
        whole: Box = (slice(0, mask.array.shape[0]), slice(0, mask.array.shape[1]), slice(0, mask.array.shape[2]))
        return cls(
            labels=mask.array,
            boxes=tuple(found),
            counts=mask.counts(),
            shown=_union(box for box in found if box) if found[BODY] else whole,
            voxel_ml=prod(mask.geometry.spacing) / 1000,
            mm_x=mask.geometry.spacing[0],
        )

    def ml(self, labels: Sequence[int]) -> float:
        """Return the volume of labels."""
        return float(self.counts[list(labels)].sum()) * self.voxel_ml

    def voxels(self, labels: Sequence[int]) -> int:
        """Return the number of voxels of labels."""
        return int(self.counts[list(labels)].sum())

    def box(self, labels: Sequence[int]) -> Box:
        """Return the box that holds all of some labels, one of which occurs."""
        return _union(box for label in labels if (box := self.boxes[label]))

    def cut(self, labels: Sequence[int]) -> bool:
        """Say whether labels reach the border of the volume, or of the body where it is padded: a part may be missing."""
        return any(a.start <= b.start or a.stop >= b.stop for a, b in zip(self.box(labels), self.shown, strict=True))

    def x_mm(self, labels: Sequence[int]) -> float:
        """Return the place of the centroid of labels along the axis that points to the patient's right."""
        box = self.box(labels)
        profile = np.count_nonzero(membership(labels)[self.labels[box]], axis=(1, 2))
        return float(profile @ np.arange(box[0].start, box[0].stop)) / float(profile.sum()) * self.mm_x


def _union(boxes: Iterable[Box]) -> Box:
    rows = list(boxes)
    one, two, three = (slice(min(box[a].start for box in rows), max(box[a].stop for box in rows)) for a in range(3))
    return one, two, three


def chosen_organs(sizes: Iterable[str]) -> tuple[int, ...]:
    """Return the labels whose size was asked for: `["liver=0.5"]`; tumours, which have no size of their own, with their host."""
    vocabulary = maisi()
    ids = [vocabulary.id(text.partition("=")[0]) for text in sizes]
    hosts = [host for one in ids if (label := vocabulary.get(one)) is not None and (host := label.host) is not None]
    return tuple({*ids, *hosts})


def _body(mask: Mask | None) -> Body | None:
    return Body.of(mask) if mask is not None and mask.vocabulary == "maisi" and mask.array.any() else None


def organ_volumes(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Compare the volume of each whole organ with that of adults; an organ cut by the border says nothing.

    The bounds are those of healthy adults (0.1 to 99.9 %) with room for disease on both sides; between the two the text
    tells.
    """
    body = _body(mask)
    if body is None:
        return []
    findings = []
    slack = float(ct_table()["volumes"]["slack"])
    for row in ct_table()["volume"]:
        labels = [*row["labels"], *row.get("together", ())]
        if body.voxels(row["labels"]) < LEAST_VOXELS or not set(labels).isdisjoint(context.chosen) or body.cut(labels):
            continue
        ml, low, high = body.ml(labels), float(row["low"]), float(row["high"])
        where = "within" if low <= ml <= high else "below" if ml < low else "above"
        text = f"{ml:.4g} ml of {row['name']}, {where} the {low:g}..{high:g} ml of healthy adults"
        findings.append(
            judged("organ-volumes", row["name"], ml, text, low=low / slack, high=high * slack, tell=context.tells_anatomy),
        )
    return findings


def components(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Measure how much of each organ that is one piece lies in its largest piece.

    Pieces that reach the border of the volume do not count against it: there the connection may lie outside.
    """
    body = _body(mask)
    if body is None:
        return []
    findings = []
    for row in ct_table()["piece"]:
        (label,) = row["labels"]
        if body.counts[label] < LEAST_VOXELS:
            continue
        share, pieces = _largest(body, label, row.get("together", ()))
        text = f"{share:.1%} of {row['name']} in one piece" + (f", the rest in {pieces - 1} more" if share < 1 else "")
        findings.append(
            judged("components", row["name"], share, text, low=float(row["least"]), high=1.0, tell=context.tells_anatomy),
        )
    return findings


def _largest(body: Body, label: int, together: Sequence[int]) -> tuple[float, int]:
    """Return the share of a label in its largest piece or in pieces that reach the border, and the number of all pieces.

    Labels `together` (lesions and vessels inside the organ) connect, but do not count.
    """
    box = body.box([label, *together]) if together else body.box([label])
    part = body.labels[box]
    pieces, number = ndimage.label(membership([label, *together])[part], structure=np.ones((3, 3, 3)))
    sizes = np.bincount(pieces[part == label], minlength=number + 1)
    kept = np.zeros(number + 1, dtype=bool)
    kept[np.argmax(sizes)] = True
    for axis, (here, shown) in enumerate(zip(box, body.shown, strict=True)):
        if here.start <= shown.start:
            kept[np.take(pieces, 0, axis)] = True
        if here.stop >= shown.stop:
            kept[np.take(pieces, -1, axis)] = True
    return float(sizes[kept].sum()) / float(sizes.sum()), int(np.count_nonzero(sizes))


def laterality(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Look whether what is called left lies left of its partner, and the organs that have a side lie on it.

    A map that is mirrored, or whose axes are named wrongly, fails.
    """
    body = _body(mask)
    if body is None:
        return []
    findings = []
    pairs = [pair for pair in _pairs() if all(body.ml([one]) >= LEAST_ML for one in pair)]
    wrong = [left for left, right in pairs if body.x_mm([left]) >= body.x_mm([right])]
    if pairs:
        names = ", ".join(maisi().name_of(label) for label in wrong[:4]) + (", ..." if len(wrong) > 4 else "")
        text = f"{len(wrong)} of {len(pairs)} pairs have their sides exchanged" + (f": {names}" if wrong else "")
        findings.append(judged("laterality", "pairs", float(len(wrong)), text, high=0.0, tell=context.tells_anatomy))
    for row in ct_table()["side"]:
        left, right = ([label for label in row[side] if body.counts[label]] for side in ("left", "right"))
        if body.ml(left) < row["least_ml"] or body.ml(right) < row["least_ml"] or (row.get("whole") and body.cut(left)):
            continue
        mm = body.x_mm(right) - body.x_mm(left)
        text = f"{row['name']}: {mm:.0f} mm" if mm >= 0 else f"{row['name']}: no, {-mm:.0f} mm the other way"
        findings.append(judged("laterality", row["name"], mm, text, low=0.0, tell=context.tells_anatomy))
    return findings


@cache
def _pairs() -> tuple[tuple[int, int], ...]:
    vocabulary = maisi()
    names = {label.name: label.id for label in vocabulary.labels}
    other = ((label.id, names.get(f"right{label.name.removeprefix('left')}")) for label in vocabulary.labels if label.side == "left")
    return tuple((left, right) for left, right in other if right is not None)


def organs_expected(image: Volume | None, mask: Mask | None, context: Context) -> list[Finding]:
    """Look for organs that are missing although their neighbours show that their place is in view.

    Nothing is said of a label map that lacks most of what could be expected: it was not made to hold organs.
    """
    body = _body(mask)
    if body is None:
        return []
    seen = [(row, _near(row, body)) for row in ct_table()["expected"] if set(row["labels"]).isdisjoint(context.chosen)]
    rows = [(row, near) for row, near in seen if near]
    missing = [(row, near) for row, near in rows if body.voxels(row["labels"]) == 0]
    if not rows or len(missing) > len(rows) / 2:
        return []
    if not missing:
        return [judged("organs-expected", None, 0.0, f"all {len(rows)} organs that must be in view are there", high=0.0)]
    return [_missing(row, near, body, context) for row, near in missing]


def _near(row: dict[str, Any], body: Body) -> tuple[int, ...]:
    """Return the first set of neighbours that is in view, or nothing."""
    whole = row.get("whole", ())

    def shown(label: int) -> bool:
        return body.ml([label]) >= LEAST_ML and not (label in whole and body.cut([label]))

    return next((each for each in row["when"] if all(map(shown, each))), ())


def _missing(row: dict[str, Any], near: Sequence[int], body: Body, context: Context) -> Finding:
    shown = ", ".join(maisi().name_of(label) for label in near)
    text = f"no {row['name']}, although {shown} are in view"
    return judged("organs-expected", row["name"], 0.0, text, low=body.voxel_ml, tell=context.tells_anatomy)


for _check in (organ_volumes, components, laterality, organs_expected):
    _check.needs_image = False  # type: ignore[attr-defined]
