"""The body frame in which the phantom is drawn, one person's habitus, and smooth random fields.

Coordinates are in mm for an average adult: x to the right of the midline, y anterior, z superior, with z =
0 at the disc L5/S1. A person is this frame seen through a smooth deformation (stature, width, depth, pose,
a random warp), so organs keep their neighbours while every seed gives another body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..geometry import Geometry

Array = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Ids = Callable[[str], int]  # from a label's name to its id

_PERSON, _POSE, _FIELD, _ORGANS = range(0x6D610, 0x6D614)  # what a random stream is for

# vertebrae from the sacrum upward: name, z of the centre of the vertebral body
LEVELS: tuple[tuple[str, float], ...] = (
    ("vertebrae S1", -14.0),
    ("vertebrae L5", 17.0),
    ("vertebrae L4", 51.0),
    ("vertebrae L3", 85.0),
    ("vertebrae L2", 118.0),
    ("vertebrae L1", 150.0),
    ("vertebrae T12", 180.0),
    ("vertebrae T11", 208.0),
    ("vertebrae T10", 234.5),
    ("vertebrae T9", 259.5),
    ("vertebrae T8", 283.0),
    ("vertebrae T7", 305.5),
    ("vertebrae T6", 327.0),
    ("vertebrae T5", 347.5),
    ("vertebrae T4", 367.5),
    ("vertebrae T3", 387.0),
    ("vertebrae T2", 406.0),
    ("vertebrae T1", 424.5),
    ("vertebrae C7", 442.0),
    ("vertebrae C6", 458.5),
    ("vertebrae C5", 474.5),
    ("vertebrae C4", 490.5),
    ("vertebrae C3", 506.5),
    ("vertebrae C2", 523.0),
    ("vertebrae C1", 540.0),
)

# what part of the body, in z, each region of a field of view is centred on
REGION_Z: dict[str, tuple[float, float]] = {
    "head": (500.0, 770.0),
    "chest": (210.0, 462.0),
    "abdomen": (0.0, 260.0),
    "lower": (-340.0, 10.0),
}


def profile(z: Array | float, table: Sequence[tuple[float, float]]) -> Array:
    """Interpolate a table of (z, value) linearly, constant beyond its ends."""
    knots = np.asarray(table, dtype=np.float32)
    return np.asarray(np.interp(z, knots[:, 0], knots[:, 1]), dtype=np.float32)


def spine_y(z: Array | float, bend: float = 1.0) -> Array:
    """Return y of the vertebral bodies' centres: lumbar lordosis, thoracic kyphosis, cervical lordosis."""
    table = [
        (-150, -70),
        (-80, -62),
        (-40, -34),
        (-14, -10),
        (17, 8),
        (51, 14),
        (85, 12),
        (118, 4),
        (150, -7),
        (180, -17),
        (234, -34),
        (283, -44),
        (327, -48),
        (367, -45),
        (406, -34),
        (442, -18),
        (490, -4),
        (540, 2),
        (600, 2),
    ]
    return profile(z, [(at, value * bend) for at, value in table])


@dataclass(frozen=True, slots=True, kw_only=True)
class Habitus:
    """One person: stature and girth factors, thickness of subcutaneous fat in mm, spinal bend, sex."""

    stature: float
    width: float
    depth: float
    fat_mm: float
    muscle: float
    bend: float
    sex: str

    @classmethod
    def draw(cls, seed: int, sex: str | None = None) -> Habitus:
        """Draw a person: thin to obese, small to tall."""
        rng = np.random.default_rng([_PERSON, seed])
        girth = float(np.clip(rng.beta(2.0, 2.6), 0.03, 0.97))
        drawn = "male" if rng.random() < 0.5 else "female"
        who = sex or drawn
        return cls(
            stature=float(np.clip(rng.normal(1.0 if who == "male" else 0.95, 0.04), 0.86, 1.12)),
            width=float(0.90 + 0.24 * girth + rng.normal(0, 0.02)),
            depth=float(0.88 + 0.32 * girth + rng.normal(0, 0.025)),
            fat_mm=float(6.0 + 38.0 * girth**1.5 + rng.uniform(-2, 3)),
            muscle=float(np.clip(rng.normal(1.0 if who == "male" else 0.92, 0.07), 0.8, 1.2)),
            bend=float(rng.uniform(0.8, 1.2)),
            sex=who,
        )


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], cell: Sequence[float]) -> Array:
    """Return a smooth field of about zero mean and unit variance; `cell` is its grain in voxels on each
    axis.
    """
    coarse = [max(4, int(np.ceil(n / max(c, 1e-3))) + 4) for n, c in zip(shape, cell, strict=True)]
    seeds = rng.standard_normal(coarse).astype(np.float32)
    where = [np.arange(n, dtype=np.float32) / max(c, 1e-3) + 1.5 for n, c in zip(shape, cell, strict=True)]
    field: Array = seeds
    for axis, at in enumerate(where):
        field = _spline_axis(field, at, axis)
    return field * np.float32(1.65)


def _spline_axis(field: Array, at: Array, axis: int) -> Array:
    """Blend along one axis with the uniform cubic B-spline, which is smooth to the second derivative."""
    start = np.floor(at).astype(int)
    t = (at - start).astype(np.float32)
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    shape = [1] * field.ndim
    shape[axis] = len(at)
    total: Array | None = None
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        part = np.take(field, start + offset, axis=axis, mode="wrap") * weight.reshape(shape)
        total = part if total is None else total + part
    assert total is not None
    return total.astype(np.float32, copy=False)


class Canvas:
    """The labels being painted, with the body-frame coordinates of every voxel.

    `x`, `y`, `z` are float32 arrays of the grid's shape, in mm of the body frame; `labels` is uint8.
    Painting never covers a structure that is already there: what is painted first has priority.
    """

    def __init__(self, geometry: Geometry, seed: int, habitus: Habitus, regions: Sequence[str]) -> None:
        rng = np.random.default_rng([_POSE, seed])
        self.geometry, self.seed, self.habitus = geometry, seed, habitus
        self.labels = np.zeros(geometry.size, dtype=np.uint8)
        lows, highs = zip(*(REGION_Z[region] for region in regions), strict=True)
        middle = (min(lows) + max(highs)) / 2 * habitus.stature + rng.uniform(-12, 12)
        centre = (rng.uniform(-8, 8), 14 * habitus.depth + rng.uniform(-8, 8), middle)
        self.axes = [
            (np.arange(n, dtype=np.float32) - (n - 1) / 2) * mm + at
            for n, mm, at in zip(geometry.size, geometry.spacing, centre, strict=True)
        ]
        x, y, z = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        turn, tilt, lean = rng.normal(0, (0.03, 0.015, 0.02))
        scoliosis = np.float32(rng.normal(0, 3))
        z_away = z - middle
        scale = 1 / np.float32(habitus.stature)
        grown_x, grown_y = 1 / np.float32(habitus.width), 1 / np.float32(habitus.depth)
        warp = [4.0 * self.field(2 * i, 95) + 1.5 * self.field(2 * i + 1, 38) for i in range(3)]
        self.x = ((x - turn * y + lean * z_away) * grown_x + warp[0]).astype(np.float32)
        self.y = ((y + turn * x + tilt * z_away) * grown_y + warp[1]).astype(np.float32)
        self.z = ((z - tilt * y - lean * x) * scale + warp[2]).astype(np.float32)
        self.x += scoliosis * np.sin((self.z - 150) / 190)
        self._ranges = [
            tuple(reduce(coordinate, axis=tuple(other for other in range(3) if other != axis)) for reduce in (np.min, np.max))
            for axis, coordinate in enumerate((self.x, self.y, self.z))
        ]
        self.grain = [self.field(6 + i, 26) for i in range(2)]

    def field(self, key: int, cell_mm: float, box: Box | None = None) -> Array:
        """Return a smooth random field of about unit variance that is fixed in the body: it is the same on
        every grid.

        `key` tells the fields of one person apart, `cell_mm` is the grain.
        """
        values = np.random.default_rng([_FIELD, self.seed, key]).standard_normal((40, 40, 40)).astype(np.float32)
        for axis, at in enumerate(self.axes):
            values = _spline_axis(values, (at if box is None else at[box[axis]]) / np.float32(cell_mm), axis)
        return values * np.float32(1.65)

    def box(self, low: Sequence[float], high: Sequence[float]) -> Box | None:
        """Return the slices that hold every voxel between two corners (mm, body frame), or None when none
        does.
        """
        slices = []
        for axis in range(3):
            keep = np.ones(self.geometry.size[axis], dtype=bool)
            lower, upper = self._ranges[axis]
            keep &= (upper >= low[axis]) & (lower <= high[axis])
            index = np.flatnonzero(keep)
            if index.size == 0:
                return None
            slices.append(slice(int(index[0]), int(index[-1]) + 1))
        return slices[0], slices[1], slices[2]

    def paint(self, label: int, inside: NDArray[np.bool_], box: Box, *, over: Sequence[int] = (200,)) -> None:
        """Paint `label` where `inside` (of the box's shape) holds and the canvas shows one of `over`."""
        view = self.labels[box]
        free = view == over[0]
        for other in over[1:]:
            free |= view == other
        view[inside & free] = label

    def ellipsoid(
        self,
        label: int,
        centre: Sequence[float],
        radii: Sequence[float],
        *,
        rough: float = 0.0,
        power: float = 2.0,
        turn_deg: tuple[float, float, float] = (0, 0, 0),
        where: Array | None = None,
        over: Sequence[int] = (200,),
    ) -> None:
        """Paint a superellipsoid with a rough surface; `turn_deg` turns it about x, y and z; `where` > 0
        limits it.
        """
        reach = max(radii) * 1.15 + 4
        box = self.box([c - reach for c in centre], [c + reach for c in centre])
        if box is None:
            return
        level = self.level(box, centre, radii, power=power, turn_deg=turn_deg)
        if rough:
            level = level + rough * self.grain[label % 2][box]
        inside = level < 1
        if where is not None:
            inside &= where[box] > 0
        self.paint(label, inside, box, over=over)

    def level(
        self,
        box: Box,
        centre: Sequence[float],
        radii: Sequence[float],
        *,
        power: float = 2.0,
        turn_deg: tuple[float, float, float] = (0, 0, 0),
    ) -> Array:
        """Return the radial level of a superellipsoid in the box: 1 on its surface, 0 at its centre."""
        p = np.stack([self.x[box] - centre[0], self.y[box] - centre[1], self.z[box] - centre[2]])
        if any(turn_deg):
            p = np.tensordot(_rotation(turn_deg).T, p, axes=1)
        total = sum(np.abs(q / r) ** power for q, r in zip(p, radii, strict=True))
        return np.asarray(total, dtype=np.float32) ** np.float32(1 / power)

    def tube(
        self,
        label: int,
        points: Sequence[Sequence[float]],
        radii: float | Sequence[float] | NDArray[Any],
        *,
        rough: float = 0.0,
        squash: Sequence[float] = (1, 1, 1),
        where: Array | None = None,
        over: Sequence[int] = (200,),
    ) -> None:
        """Paint a tube along a smooth curve through `points`, with one radius or one for each point.

        `squash` stretches the cross-section along x, y and z.
        """
        path = np.asarray(points, dtype=np.float64)
        width = np.full(len(path), radii, dtype=np.float64) if np.isscalar(radii) else np.asarray(radii, dtype=np.float64)
        if len(path) > 2:
            path, width = _smooth_curve(path, width)
        stretch = np.asarray(squash, dtype=np.float64)
        for a, b, ra, rb in zip(path[:-1], path[1:], width[:-1], width[1:], strict=True):
            reach = max(ra, rb) * stretch * 1.2 + 2
            box = self.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            if box is None:
                continue
            axis = ((b - a) / stretch).astype(np.float32)
            length2 = float(axis @ axis) or 1.0
            dx = (self.x[box] - np.float32(a[0])) / np.float32(stretch[0])
            dy = (self.y[box] - np.float32(a[1])) / np.float32(stretch[1])
            dz = (self.z[box] - np.float32(a[2])) / np.float32(stretch[2])
            t = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / length2, 0, 1)
            radius = np.float32(ra) + np.float32(rb - ra) * t
            if rough:
                radius = radius * (1 + rough * self.grain[label % 2][box])
            away2 = (dx - t * axis[0]) ** 2 + (dy - t * axis[1]) ** 2 + (dz - t * axis[2]) ** 2
            inside = away2 < radius**2
            if where is not None:
                inside &= where[box] > 0
            self.paint(label, inside, box, over=over)


def _rotation(turn_deg: Sequence[float]) -> NDArray[np.float64]:
    a, b, c = np.deg2rad(turn_deg)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _smooth_curve(path: NDArray[np.float64], width: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Refine a polyline to about 12 mm steps with a cubic spline through its points."""
    from scipy.interpolate import CubicSpline

    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-6))])
    fine = np.linspace(0, along[-1], max(len(path), int(along[-1] / 12) + 2))
    return CubicSpline(along, path)(fine), np.interp(fine, along, width)


def keep_largest(labels: NDArray[np.uint8], label: int) -> None:
    """Turn all but the largest 6-connected piece of `label` into body (200), in place."""
    boxes = ndimage.find_objects((labels == label).astype(np.uint8))
    if not boxes or boxes[0] is None:
        return
    view = labels[boxes[0]]
    pieces, count = ndimage.label(view == label)
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        view[(pieces > 0) & (pieces != sizes.argmax())] = 200
