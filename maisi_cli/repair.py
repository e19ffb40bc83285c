"""Repairs generated masks: tumours nobody asked for go, stray pieces go, and small gaps in organs close.

A mask decoder votes voxel by voxel, so its masks hold specks, holes and lesions that were not requested. All
functions take and return uint8 labels of shape (X, Y, Z) with MAISI ids and leave their input as it was. Under
`compat` they do what the reference does, voxel for voxel (2.7 and 2.9 of its fact sheet), its errors included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from .anatomy import BODY, maisi
from .envelope import dilate, erode, largest
from .errors import UsageError
from .tumors import BONE_LESION, COLON_TUMOR, LIVER_TUMOR, LUNG_TUMOR, PANCREATIC_TUMOR, hosts

Labels = NDArray[np.uint8]
Bits = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

_LIVER, _SPLEEN, _VESSEL, _AIRWAY = 1, 3, 25, 132
_LOBES = (28, 29, 30, 31, 32)
_BOWEL = (12, 13, 19, 62)
_ONE_PIECE = (1, 4, 10, 12, 3, 28, 29, 30, 31, 32, 5, 14, 13, 6, 7, 8, 9)
_BONES_IN_ONE_PIECE = tuple(range(33, 60))
_BECOMES = {LUNG_TUMOR: 28, PANCREATIC_TUMOR: 4, LIVER_TUMOR: _LIVER, COLON_TUMOR: 62, BONE_LESION: BODY}
_MANY = (LIVER_TUMOR, BONE_LESION)
"""Tumours that may lie in several places."""


def lesions_of(labels: Labels) -> tuple[int, ...]:
    """Return the lesions that a mask holds: tumours, cysts and the kidney mass."""
    return tuple(_lesion_boxes(labels))


def _lesion_boxes(labels: Labels) -> dict[int, Box]:
    found = ndimage.find_objects(labels)  # counts would take eight bytes a voxel
    return {value: box for value, box in enumerate(found, start=1) if box is not None and hosts(value)}


def repair(labels: Labels, *, tumor: int | None = None, compat: bool = False) -> Labels:
    """Return a generated mask with its faults mended; `tumor` is the one tumour that stays, None for no tumour at all.

    What hangs loose of the body goes. Other lesions become the organ around them; of the tumour its largest
    piece stays (of liver tumours and bone lesions all that touch their organ). Organs keep their largest piece,
    and gaps up to two voxels wide in them close, without taking voxels of another organ. Hepatic vessels become
    liver. What stays of the tumour is restored last.

    With `compat`, exactly as the reference does: unwanted lung tumours become the left upper lobe and bone
    lesions soft tissue, the kidney mass stays, organs grow over one another, and thin liver tumours vanish.
    Raises `UsageError` when `tumor` is not a tumour that the mask decoder knows.
    """
    labels = checked(labels)
    if tumor is not None and (tumor not in _BECOMES if compat else not hosts(tumor)):
        raise UsageError(f"label {tumor} ({maisi().name_of(tumor)}) is no tumour of generated masks",
                         hint=f"use one of {', '.join(maisi().name_of(known) for known in _BECOMES)}")  # fmt: skip
    return _reference(labels, tumor) if compat else _mended(labels, tumor)


def without_lesions(labels: Labels, *, keep: int | None = None, compat: bool = False) -> Labels:
    """Return a mask in which each tumour, cyst and kidney mass but `keep` is the organ around it.

    Each voxel takes the nearest touching host label; a piece that touches none becomes body (200). With
    `compat` as the reference's tumour-free condition (2.9): a lung tumour becomes the lobe that most of its
    ring shows, where the border of the volume counts as ring, and bone lesions and the kidney mass stay.
    """
    labels = checked(labels)
    if compat:
        return _reference_without(labels, keep)
    result = labels.copy()
    for lesion, box in _lesion_boxes(labels).items():
        if lesion != keep:
            view = result[grown(box, labels.shape, 1)]
            fill(view, view == lesion, hosts(lesion))
    return result


def fill(labels: Labels, where: Bits, host: Sequence[int]) -> None:
    """Give each voxel of `where` the label of the nearest `host` voxel that touches it; loose pieces become 200. In place."""
    box = bounds(where, margin=1)
    if box is None:
        return
    inside, view = where[box], labels[box]
    of_host = among(view, host) & ~inside
    near = of_host & dilate(inside, 3)
    filled = pieces_at(inside, of_host)
    view[inside & ~filled] = BODY
    values = view[near]
    if filled.any() and (values == values[0]).all():
        view[filled] = values[0]
    elif filled.any():
        _, nearest = KDTree(np.argwhere(near)).query(np.argwhere(filled))
        view[filled] = values[nearest]


def pieces_at(bits: Bits, host: Bits) -> Bits:
    """Return the pieces of `bits` that touch `host`, a corner being enough."""
    parts, number = ndimage.label(bits, structure=np.ones((3, 3, 3), dtype=bool))
    touching = np.zeros(number + 1, dtype=bool)
    touching[parts[bits & dilate(host, 3)]] = True
    return touching[parts]


def checked(labels: Labels) -> Labels:
    """Return the labels if they are a uint8 volume, else raise `TypeError`."""
    if labels.dtype != np.uint8 or labels.ndim != 3:
        raise TypeError(f"labels are a uint8 volume, not {labels.dtype} of {labels.ndim} axes")
    return labels


def among(labels: Labels, ids: Iterable[int]) -> Bits:
    """Say which voxels hold one of the ids; a look-up of 256 entries."""
    table = np.zeros(256, dtype=bool)
    table[list(ids)] = True
    return table[labels]


def bounds(bits: Bits, *, margin: int = 0) -> Box | None:
    """Return the box around all true voxels, grown by `margin` within the volume, or None when there is none."""
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        found = np.flatnonzero(bits.any(axis=others))
        if not found.size:
            return None
        spans.append(slice(max(0, int(found[0]) - margin), min(bits.shape[axis], int(found[-1]) + 1 + margin)))
    return spans[0], spans[1], spans[2]


# --- as it should be ------------------------------------------------------------------------------------------


def _mended(labels: Labels, tumor: int | None) -> Labels:
    labels = labels.copy()
    labels[~_body(labels)] = 0
    airway = labels == _AIRWAY
    labels[labels == _VESSEL] = _LIVER
    labels = without_lesions(labels, keep=tumor)
    if tumor is not None:
        _choose_pieces(labels, tumor)
    lesion = labels == tumor if tumor is not None else np.zeros_like(airway)
    organs = _organs(tumor)
    removed, bowel = _drop_strays(labels, organs)
    _close_each(labels, organs, free=(BODY,))
    if tumor == LUNG_TUMOR and lesion.any():
        _extend_lobe(labels, free=labels == BODY)
        _close_each(labels, _LOBES, free=(BODY,))
    if tumor == LIVER_TUMOR and lesion.any():
        _reclaim(labels, _LIVER, bowel & (labels == BODY), box=7, times=2)
        _reclaim(labels, _SPLEEN, removed & (labels == BODY), box=7, times=2)
        _close_each(labels, (_LIVER,), free=(BODY,))
    labels[airway] = _AIRWAY
    if tumor is not None:
        labels[lesion] = tumor
    return labels


def _choose_pieces(labels: Labels, tumor: int) -> None:
    """Close the gaps in the tumour, and give all of it that does not stay to its organ."""
    host = hosts(tumor)
    _close_each(labels, (tumor,), free=(*host, BODY))
    lesion = labels == tumor
    if tumor == LIVER_TUMOR:
        stays = lesion & largest(lesion | (labels == _LIVER))
    elif tumor in _MANY:
        stays = pieces_at(lesion, among(labels, host))
    else:
        stays = largest(lesion)
    fill(labels, lesion & ~stays, host)


# --- as the reference does ------------------------------------------------------------------------------------


def _reference(labels: Labels, tumor: int | None) -> Labels:
    vessel, airway = labels == _VESSEL, labels == _AIRWAY
    labels = labels.copy()
    labels[~_body(labels, _last_largest)] = 0
    for other, host in _BECOMES.items():
        if other != tumor:
            labels[labels == other] = host
    lesion = np.zeros_like(vessel)
    if tumor is not None:
        _close_each(labels, (tumor,))
        lesion = labels == tumor
        if tumor not in _MANY:
            kept = _last_largest(lesion)
            labels[lesion & ~kept] = BODY
            lesion = kept
    organs = _organs(tumor)
    removed, bowel = _drop_strays(labels, organs, _last_largest)
    _close_each(labels, organs)
    if tumor is not None and lesion.any():
        if tumor == LUNG_TUMOR:
            _extend_lobe(labels)
            _reclaim(labels, tumor, removed, box=5)
            _close_each(labels, _LOBES)
        elif tumor == LIVER_TUMOR:
            _reclaim(labels, _LIVER, bowel, box=7, times=2)
            _reclaim(labels, _SPLEEN, removed, box=7, times=2)
            _reclaim(labels, tumor, removed, box=5)
            _close_each(labels, (_LIVER,))
            lesion[...] = False  # its component filter is empty by mistake, and nothing is restored
        elif tumor == COLON_TUMOR:
            _reclaim(labels, tumor, removed, box=5)
    labels[vessel] = _LIVER
    labels[airway] = _AIRWAY
    if tumor is not None:
        labels[lesion] = tumor
    return labels


def _last_largest(bits: Bits) -> Bits:
    """As `largest`; of several that are as large the last, by y, then x, then z, which is the reference's choice."""
    parts, number = ndimage.label(bits.transpose(1, 0, 2), structure=np.ones((3, 3, 3), dtype=bool))
    if number < 2:
        return bits
    sizes = np.bincount(parts.ravel())[1:]
    found: Bits = parts.transpose(1, 0, 2) == number - int(sizes[::-1].argmax())
    return found


def _reference_without(labels: Labels, keep: int | None) -> Labels:
    table = np.arange(256, dtype=np.uint8)
    table[[LIVER_TUMOR, PANCREATIC_TUMOR, COLON_TUMOR, 116, 117]] = (_LIVER, 4, 62, 14, 5)
    lung = labels == LUNG_TUMOR
    if lung.any():
        table[LUNG_TUMOR] = ring_lobe(labels, lung)
    if keep is not None:
        table[keep] = keep
    return table[labels]


def ring_lobe(labels: Labels, lesion: Bits) -> int:
    """Return the lobe that most of the ring of a lung lesion shows, or most of the volume, as the reference counts.

    Its ring includes the faces of the volume (row 33 of its faults). Without any lobe it is the left upper one.
    """
    counts = np.bincount(labels[dilate(lesion, 3, outside=True) & ~lesion], minlength=256)[list(_LOBES)]
    if not counts.any():
        counts = np.bincount(labels.ravel(order="K"), minlength=256)[list(_LOBES)]
    return _LOBES[int(counts.argmax())]


# --- steps ----------------------------------------------------------------------------------------------------


def _organs(tumor: int | None) -> tuple[int, ...]:
    """Return the organs that are one piece; bones are not when a lesion may split them."""
    return _ONE_PIECE if tumor == BONE_LESION else _ONE_PIECE + _BONES_IN_ONE_PIECE


def _body(labels: Labels, largest: Callable[[Bits], Bits] = largest) -> Bits:
    """Say which voxels belong to the largest thing in the volume, threads and specks cut off."""
    return dilate(largest(erode(labels > 0, 3, outside=False)), 3)


def _drop_strays(labels: Labels, organs: Sequence[int], largest: Callable[[Bits], Bits] = largest) -> tuple[Bits, Bits]:
    """Make body of what is not in an organ's largest piece; return these voxels, and those of the bowel apart. In place."""
    removed, bowel = np.zeros(labels.shape, dtype=bool), np.zeros(labels.shape, dtype=bool)
    found = ndimage.find_objects(labels)
    for organ in organs:
        if organ <= len(found) and (box := found[organ - 1]) is not None:
            bits = labels[box] == organ
            stray = bits & ~largest(bits)
            labels[box][stray] = BODY
            removed[box] |= stray
    united = among(labels, _BOWEL)
    box = bounds(united)
    if box is not None:
        loose = united[box] & ~largest(united[box]) & among(labels[box], (19, 62))
        labels[box][loose] = BODY
        bowel[box] = loose
    return removed, bowel


def _close_each(labels: Labels, organs: Sequence[int], *, free: Sequence[int] | None = None) -> None:
    """Grow each organ into its closing by a cube of three voxels, over labels that are `free` (None: over all). In place."""
    found = ndimage.find_objects(labels)
    for organ in organs:
        if organ > len(found) or found[organ - 1] is None:
            continue
        box = grown(found[organ - 1], labels.shape, 2)
        view = labels[box]
        closed = erode(dilate(view == organ, 3), 3, outside=False)
        view[closed if free is None else closed & among(view, free)] = organ


def grown(box: Box, shape: Sequence[int], margin: int) -> Box:
    """Return a box with `margin` voxels more on each side, within the volume."""
    low, middle, high = (slice(max(0, span.start - margin), min(n, span.stop + margin)) for span, n in zip(box, shape, strict=True))
    return low, middle, high


def _extend_lobe(labels: Labels, *, free: Bits | None = None) -> None:
    """Let the lobe that most of a lung tumour's ring shows grow around the tumour, two voxels thick. In place."""
    box = bounds(labels == LUNG_TUMOR, margin=6)
    if box is None:
        return
    view = labels[box]
    lesion = view == LUNG_TUMOR
    counts = np.bincount(view[dilate(lesion, 3) & ~lesion], minlength=256)
    counts[0] = 0
    lobe = int(counts.argmax())
    if lobe in _LOBES:
        around = dilate(view == lobe, 7) & dilate(lesion, 5) & ~lesion
        view[around if free is None else around & free[box]] = lobe


def _reclaim(labels: Labels, organ: int, lost: Bits, *, box: int, times: int = 1) -> None:
    """Give the voxels `lost` back to an organ that lies within half a cube of `box` voxels. In place."""
    for _ in range(times):
        labels[dilate(labels == organ, box) & lost] = organ
