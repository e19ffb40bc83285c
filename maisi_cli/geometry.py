"""Where voxels lie: the size, spacing, field of view and affine of a volume, and the latent grid below it.

Arrays are always held in RAS+ order (axis 0 runs to the patient's right, 1 to anterior, 2 to superior); `axcodes`
remembers how the file they came from was stored, so that a result can be written on that very grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .errors import UsageError

Size = tuple[int, int, int]
Triple = tuple[float, float, float]
Affine = tuple[tuple[float, ...], ...]

_NUMBER = re.compile(r"^\d+(\.\d+)?$")


def parse_size(text: str | Sequence[int]) -> Size:
    """Parse a size in voxels, `512x512x128` or three whole numbers. Raises `UsageError`."""
    x, y, z = _parse(text, "size", "512x512x128")
    if any(value != int(value) for value in (x, y, z)):
        raise UsageError(f"size {format_triple((x, y, z))} is not in whole voxels", hint="write it like 512x512x128")
    return int(x), int(y), int(z)


def parse_mm(text: str | Sequence[float], what: str = "spacing") -> Triple:
    """Parse three lengths in mm, `1.5x1.5x2` or three numbers; one number stands for all three axes."""
    return _parse(text, what, "1.5x1.5x2")


def _parse(text: str | Sequence[float], what: str, example: str) -> Triple:
    if isinstance(text, str):
        parts: Sequence[str | float] = text.strip().lower().replace("×", "x").split("x")
        if len(parts) == 1:
            parts = [parts[0]] * 3
        if len(parts) != 3 or not all(_NUMBER.match(str(part)) for part in parts):
            raise UsageError(f"{what} {text!r} is not three numbers joined by x", hint=f"write it like {example}")
    else:
        parts = text
    try:
        values = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) and value > 0 for value in values):
        raise UsageError(f"{what} {text!r} is not three positive numbers", hint=f"write it like {example}")
    return values[0], values[1], values[2]


def format_triple(values: Iterable[float]) -> str:
    """Format three numbers as one token: `512x512x128`, `0.781x0.781x2.981`."""
    return "x".join(f"{value:.10g}" for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A regular grid: `size` in voxels, `spacing` in mm, both in RAS+ axis order.

    `affine` (4x4, voxel to world in mm) is given where a grid was read from a file; without it the grid is
    axis-aligned with the first voxel at the origin. `axcodes` is the orientation of the stored file.
    """

    size: Size
    spacing: Triple
    affine_rows: Affine | None = None
    axcodes: str = "RAS"

    @classmethod
    def parse(
        cls,
        *,
        size: str | Sequence[int] | None = None,
        spacing: str | Sequence[float] | None = None,
        fov: str | Sequence[float] | None = None,
    ) -> Geometry:
        """Make a geometry from any two of size, spacing and field of view (mm); all three must agree.

        Raises `UsageError` when fewer than two are given or when the three disagree by more than 0.5 %.
        """
        if sum(value is not None for value in (size, spacing, fov)) < 2:
            raise UsageError("a geometry needs two of size, spacing and fov", hint="add --size, --spacing or --fov")
        voxels = parse_size(size) if size is not None else None
        mm = parse_mm(spacing) if spacing is not None else None
        extent = parse_mm(fov, "fov") if fov is not None else None
        if voxels is None:
            assert mm is not None
            assert extent is not None
            x, y, z = (max(1, round(e / s)) for e, s in zip(extent, mm, strict=True))
            voxels = (x, y, z)
            extent = None
        if mm is None:
            assert extent is not None
            x_mm, y_mm, z_mm = (e / n for e, n in zip(extent, voxels, strict=True))
            mm = (x_mm, y_mm, z_mm)
        made = cls(size=voxels, spacing=mm)
        if extent is not None and any(abs(a - b) > 0.005 * b for a, b in zip(made.fov_mm, extent, strict=True)):
            raise UsageError(
                f"size {format_triple(voxels)} times spacing {format_triple(mm)} mm is "
                f"{format_triple(made.fov_mm)} mm, not the fov {format_triple(extent)} mm",
                hint="give two of the three",
            )
        return made

    @property
    def fov_mm(self) -> Triple:
        """The field of view: size times spacing, in mm."""
        x, y, z = (round(n * s, 6) for n, s in zip(self.size, self.spacing, strict=True))
        return x, y, z

    @property
    def voxels(self) -> int:
        """The number of voxels."""
        return math.prod(self.size)

    @property
    def affine(self) -> Affine:
        """The 4x4 voxel-to-world matrix of the RAS+ array, in mm."""
        if self.affine_rows is not None:
            return self.affine_rows
        x, y, z = self.spacing
        return (x, 0.0, 0.0, 0.0), (0.0, y, 0.0, 0.0), (0.0, 0.0, z, 0.0), (0.0, 0.0, 0.0, 1.0)

    def latent_size(self, factor: int = 4) -> Size:
        """Return the grid of the latent below this volume; every axis must divide by `factor`."""
        if any(n % factor for n in self.size):
            raise UsageError(
                f"size {format_triple(self.size)} does not divide by {factor}",
                hint=f"use {format_triple(self.padded(factor).size)}",
            )
        x, y, z = (n // factor for n in self.size)
        return x, y, z

    def padded(self, multiple: int) -> Geometry:
        """Return the smallest geometry around this one whose axes divide by `multiple`, padded evenly.

        The extra voxels go half before and half (rounded up) after; the affine moves with the first voxel.
        """
        x, y, z = (-(-n // multiple) * multiple for n in self.size)
        return self.around((x, y, z))

    def around(self, size: Size) -> Geometry:
        """Return the geometry of `size` voxels centred on this one (see `pad_before` for the shift)."""
        before = self.pad_before(size)
        rows = [list(row) for row in self.affine]
        for row in rows[:3]:
            row[3] -= sum(row[axis] * before[axis] for axis in range(3))
        moved = tuple(tuple(row) for row in rows)
        plain = self.affine_rows is None and before == (0, 0, 0)
        return replace(self, size=size, affine_rows=None if plain else moved)

    def pad_before(self, size: Size) -> Size:
        """Return how many voxels `around(size)` adds before the first voxel of each axis."""
        x, y, z = ((new - old) // 2 for new, old in zip(size, self.size, strict=True))
        return x, y, z

    def resized(self, size: Size) -> Geometry:
        """Return the same field of view on another number of voxels, axis-aligned."""
        x, y, z = (f / n for f, n in zip(self.fov_mm, size, strict=True))
        return Geometry(size=size, spacing=(x, y, z))

    def regridded(self, size: Size, spacing: Triple) -> Geometry:
        """Return the grid of `size` voxels of `spacing` mm along the same axes, about the same centre."""
        rows = []
        for row in self.affine[:3]:
            axes = [row[k] / self.spacing[k] for k in range(3)]  # unit vectors of the axes
            centre = row[3] + sum(row[k] * (self.size[k] - 1) / 2 for k in range(3))
            first = centre - sum(axes[k] * spacing[k] * (size[k] - 1) / 2 for k in range(3))
            rows.append((*(axes[k] * spacing[k] for k in range(3)), first))
        return replace(self, size=size, spacing=spacing, affine_rows=(rows[0], rows[1], rows[2], (0.0, 0.0, 0.0, 1.0)))

    def close_to(self, other: Geometry, *, tolerance_mm: float = 1e-3) -> bool:
        """Say whether two grids have the same size and the same corners to within `tolerance_mm`."""
        if self.size != other.size:
            return False
        scale = max(self.size)
        return all(
            abs(a - b) * (scale if column < 3 else 1) <= tolerance_mm
            for mine, theirs in zip(self.affine, other.affine, strict=True)
            for column, (a, b) in enumerate(zip(mine, theirs, strict=True))
        )

    def __str__(self) -> str:
        spacing = "x".join(f"{value:.4g}" for value in self.spacing)
        fov = "x".join(f"{value:.0f}" for value in self.fov_mm)
        return f"{format_triple(self.size)} voxels at {spacing} mm = {fov} mm"
