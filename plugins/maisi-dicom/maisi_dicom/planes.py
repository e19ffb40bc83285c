"""The planes of a grid as DICOM describes them: patient coordinates in LPS, rows, columns and slices.

An array of `maisi` is in RAS+ order. The planes that are written run the way radiologists look at them: columns to the
patient's left, rows to posterior, slices to superior, as near as the grid's own axes allow. Nothing is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from numpy.typing import NDArray

SHEAR_PIXELS = 0.5
"""How far, in pixels, the far corner of a plane may lie from where right-angled axes put it."""

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """A stack of parallel planes: all vectors are in mm, in LPS.

    `origin` is the centre of the first pixel of the first plane, `along_row` and `along_column` are the unit vectors of
    growing column and row index (Image Orientation (Patient)), `step` leads from one plane to the next.
    """

    count: int
    rows: int
    columns: int
    origin: Points
    along_row: Points
    along_column: Points
    step: Points
    row_spacing: float
    column_spacing: float

    @property
    def orientation(self) -> list[float]:
        """Image Orientation (Patient)."""
        return [*map(float, self.along_row), *map(float, self.along_column)]

    @property
    def slice_spacing(self) -> float:
        """The distance between two planes, in mm, across them."""
        return abs(float(np.cross(self.along_row, self.along_column) @ self.step))

    def position(self, plane: int) -> Points:
        """Return the centre of the first pixel of a plane: Image Position (Patient)."""
        return self.origin + plane * self.step

    def points(self, plane: int, pixels: Points) -> Points:
        """Return where pixels, rows of (column, row) indices that need not be whole, lie in the patient."""
        x, y = pixels[:, :1] * self.column_spacing, pixels[:, 1:] * self.row_spacing
        return self.position(plane) + x * self.along_row + y * self.along_column


def planes_of(geometry: Geometry) -> Planes:
    """Return the planes of a grid. Raises `UsageError` for rows and columns that are not at right angles."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(geometry.affine, dtype=np.float64)
    columns, rows, count = geometry.size
    right, front, step = affine[:3, :3].T
    column_spacing, row_spacing = float(np.linalg.norm(right)), float(np.linalg.norm(front))
    along_row = -right / column_spacing
    along_column = -front / row_spacing
    straight = along_column - (along_column @ along_row) * along_row
    straight /= np.linalg.norm(straight)
    off = float(np.linalg.norm(straight - along_column)) * rows
    if off > SHEAR_PIXELS:
        raise UsageError(
            f"the grid is sheared: as a DICOM image, with right angles, it would be {off:.1f} pixels off",
            hint="resample the mask to a right-angled grid first",
        )
    return Planes(
        count=count, rows=rows, columns=columns, origin=affine[:3, 3] + right * (columns - 1) + front * (rows - 1),
        along_row=along_row, along_column=straight, step=step, row_spacing=row_spacing, column_spacing=column_spacing,
    )  # fmt: skip


def stack(array: NDArray[Any]) -> NDArray[Any]:
    """Return a RAS+ array (X, Y, Z) as a stack of planes (slice, row, column)."""
    return array[::-1, ::-1, :].transpose(2, 1, 0)
