"""Putting a label map on another grid with nearest neighbour, axis by axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..catalog import ModelSpec
from ..geometry import Geometry, Triple
from ..volumes import Mask

Rows = NDArray[np.int64]
SAME_SPACING = 1e-3
"""How far, relative to one another, two spacings may lie apart and be taken for the same."""


def fit(mask: Mask, geometry: Geometry, *, compat: bool = False) -> Mask:
    """Return the mask on the size and spacing of `geometry`, with 0 where it holds nothing.

    Both grids share their centre, and a voxel takes the label at its own centre. With `compat` they share their first
    voxel, as the reference resamples, and what is too much or too little is cut or added around the middle; the affine
    then is that of the mask, moved along. Without it the result lies on `geometry` itself.
    """
    if mask.geometry.size == geometry.size and same_spacing(mask.geometry.spacing, geometry.spacing, 1e-6 if compat else SAME_SPACING):
        return mask if compat else replace(mask, geometry=geometry)
    axis: Callable[[int, float, int, float], Rows] = _first_voxels_agree if compat else _centres_agree
    old = mask.geometry
    rows = [axis(*each) for each in zip(old.size, old.spacing, geometry.size, geometry.spacing, strict=True)]
    array = mask.array[np.ix_(*(np.maximum(row, 0) for row in rows))]
    for number, row in enumerate(rows):
        array[(slice(None),) * number + (row < 0,)] = 0
    if not compat:
        return replace(mask, array=array, geometry=geometry)
    return replace(mask, array=array, geometry=_moved(old, geometry))


def same_spacing(one: Triple, other: Triple, tolerance: float = SAME_SPACING) -> bool:
    """Say whether two spacings agree, relative to the second."""
    return all(abs(a - b) <= tolerance * b for a, b in zip(one, other, strict=True))


def _centres_agree(n: int, mm: float, new_n: int, new_mm: float) -> Rows:
    """Return the source index of each new voxel of an axis, -1 outside."""
    position = (np.arange(new_n) + 0.5 - new_n / 2) * new_mm / mm + n / 2
    found = np.floor(position + 1e-9).astype(np.int64)
    return np.where((found >= 0) & (found < n), found, -1)


def _first_voxels_agree(n: int, mm: float, new_n: int, new_mm: float) -> Rows:
    """As `_centres_agree`, on the reference's grid: first voxels agree, then the middle is kept (MONAI's `Spacing`)."""
    length = _resampled(n, mm, new_mm)
    found = np.clip(np.rint(np.arange(length) * new_mm / mm), 0, n - 1).astype(np.int64)
    shift = _shift(length, new_n)
    place = np.arange(new_n) + shift
    return np.where((place >= 0) & (place < length), found[np.clip(place, 0, length - 1)], -1)


def _resampled(n: int, mm: float, new_mm: float) -> int:
    return int(np.rint((n - 1) * mm / new_mm + 1))


def _shift(length: int, new_n: int) -> int:
    """Return the index that becomes the first: positive where a middle part is kept, negative where voxels are added."""
    return length // 2 - new_n // 2 if length >= new_n else -((new_n - length) // 2)


def _moved(source: Geometry, wanted: Geometry) -> Geometry:
    rows = np.array(source.affine, dtype=np.float64)
    rows[:3, :3] *= np.array(wanted.spacing) / np.array(source.spacing)
    shifts = [_shift(_resampled(n, mm, new_mm), new_n)
              for n, mm, new_n, new_mm in zip(source.size, source.spacing, wanted.size, wanted.spacing, strict=True)]  # fmt: skip
    rows[:3, 3] += rows[:3, :3] @ np.array(shifts, dtype=np.float64)
    return Geometry(size=wanted.size, spacing=wanted.spacing, affine_rows=tuple(tuple(map(float, row)) for row in rows))


def suggested(geometry: Geometry, spec: ModelSpec) -> Geometry:
    """Return the grid that the reference resamples a mask of one's own to, the same one where it fits.

    Sizes are the nearest that the model takes (the smaller of two that are equally near), x and y alike; spacings are the
    field of view over the size, clipped to the model's, which can cut the field of view.
    """
    limits = spec.limits
    x, y, z = geometry.size
    if spec.valid_size(geometry.size) and abs(geometry.spacing[0] - geometry.spacing[1]) < 1e-6:
        return geometry
    across, along = (min(allowed, key=lambda n: abs(n - wanted)) for allowed, wanted in ((limits.size_xy, (x + y) / 2), (limits.size_z, z)))
    fov = (geometry.fov_mm[0] + geometry.fov_mm[1]) / 2
    xy, mm = np.clip(fov / across, *limits.spacing_xy_mm), np.clip(geometry.fov_mm[2] / along, *limits.spacing_z_mm)
    return Geometry(size=(across, across, along), spacing=(float(xy), float(xy), float(mm)))
