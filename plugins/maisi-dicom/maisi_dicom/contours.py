"""A mask's outlines as closed polygons, with a keyhole into every hole."""

from __future__ import annotations

import itertools
from typing import Any, cast

import contourpy
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Ring = NDArray[np.float64]


def outlines(mask: NDArray[Any]) -> list[Ring]:
    """Return the polygons around the True pixels of a plane: rows of (column, row), in pixels, from centre to centre.

    They run half-way between pixels that belong and pixels that do not, so that every pixel's centre lies on its own side.
    The last point is joined to the first. A hole is joined to its outline by a channel without width, which is passed
    twice: filled by either rule, even-odd or winding number, the polygon leaves the hole out.
    """
    padded = np.pad(np.asarray(mask, dtype=np.float64), 1)
    lines = contourpy.contour_generator(z=padded, name="serial", fill_type=contourpy.FillType.OuterOffset)
    polygons, offsets_of = cast(tuple[list[Ring], list[NDArray[np.uint32]]], lines.filled(0.5, 2.0))
    made = []
    for points, offsets in zip(polygons, offsets_of, strict=True):
        rings = [_corners(points[a : b - 1] - 1) for a, b in itertools.pairwise(offsets)]
        made.append(_joined(rings[0], rings[1:]))
    return made


def _corners(ring: Ring) -> Ring:
    """Return a ring, whose last point is joined to its first, without the points that lie on a straight line."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _joined(outer: Ring, holes: list[Ring]) -> Ring:
    """Return one ring that goes around the outline and, through channels between nearest points, around every hole."""
    tree = cKDTree(outer)
    for hole in sorted(holes, key=lambda ring: float(tree.query(ring)[0].min())):
        distances, nearest = cKDTree(outer).query(hole)
        there = int(np.argmin(distances))
        here = int(nearest[there])
        detour = np.roll(hole, -there, axis=0)
        outer = np.concatenate([outer[: here + 1], detour, detour[:1], outer[here:]])
    return outer
