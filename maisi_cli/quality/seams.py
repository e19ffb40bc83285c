"""The seam score: steps and gradient energy between neighbouring planes, against the planes around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..volumes import Mask, Volume
from .findings import Context, Finding, Planes, judged
from .hu import is_ct
from .table import ct_table

AXES = ("x", "y", "z")
STEP_LIMIT = 150.0
"""Larger steps are edges of organs and do not count, in HU."""
SAMPLES = 64
"""In a plane every n-th voxel is looked at, so that about this many remain along each side."""
AROUND = 6
"""How many planes on either side a plane is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What happens between plane k and plane k + 1 along one axis.

    `step` is by how many HU the median difference in soft tissue stands out from those around, `energy` the mean absolute
    difference over that of the planes around; NaN where a plane says nothing.
    """

    step: NDArray[np.float64]
    energy: NDArray[np.float64]


def profile(hu: NDArray[np.float32], axis: int) -> Profile:
    """Return the profile of an image along an axis."""
    row = ct_table()["seam"]
    planes = np.moveaxis(hu, axis, 0)
    stride = [max(1, n // SAMPLES) for n in planes.shape[1:]]
    planes = planes[:, :: stride[0], :: stride[1]]
    soft = (planes > row["low_hu"]) & (planes < row["high_hu"])
    number = len(planes) - 1
    step, energy, count = np.full(number, np.nan), np.full(number, np.nan), np.zeros(number)
    for k in range(number):
        difference = (planes[k + 1] - planes[k])[soft[k] & soft[k + 1]]
        difference = difference[np.abs(difference) < STEP_LIMIT]
        count[k] = difference.size
        if difference.size:
            step[k], energy[k] = np.median(difference), np.abs(difference).mean()
    telling = count >= max(row["least_voxels"] / (stride[0] * stride[1]), row["least_share"] * count.max(initial=0))
    step[~telling] = energy[~telling] = np.nan
    return Profile(step=_alone(step), energy=energy / _around(energy, "second"))


def _alone(step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by how much each step is larger than those beside it in its direction, and than the usual one around it.

    Where fat turns into muscle over several planes each step is like the next; a seam stands alone.
    """
    sign = np.sign(step)
    beside = np.pad(step, 1, constant_values=np.nan)
    others = np.stack([beside[:-2] * sign, beside[2:] * sign, _around(step, "median") * sign, np.zeros_like(step)])
    others[np.isnan(others)] = 0
    return np.abs(step) - others.max(axis=0)


def _around(values: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Return the median, or the second largest, of the neighbours of each value; NaN with fewer than three."""
    padded = np.pad(values, AROUND, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1)
    others = np.sort(np.delete(windows, AROUND, axis=1), axis=1)  # NaN last
    known = np.count_nonzero(~np.isnan(others), axis=1)
    rows, enough = np.arange(len(values)), known >= 3
    place = known - 2 if kind == "second" else (known - 1) // 2
    found = others[rows, np.where(enough, place, 0)]
    if kind == "median":
        found = (found + others[rows, np.where(enough, known // 2, 0)]) / 2
    found = np.where(enough, found, np.nan)
    return np.where(found > 0, found, np.nan) if kind == "second" else found


def seam(image: Volume, mask: Mask | None, context: Context) -> list[Finding]:
    """Look for planes across which the image steps as anatomy does not: the marks of tiles that do not fit; CT only.

    Every plane of the three axes is looked at, where planes are near enough to tell a seam from an organ's border. Where
    the tiles are known their planes are told apart.
    """
    if not is_ct(image):
        return []
    row = ct_table()["seam"]
    hu = np.asarray(image.array, dtype=np.float32)
    findings = []
    for axis, name in enumerate(AXES):
        if hu.shape[axis] <= row["least_planes"] or image.geometry.spacing[axis] > row["most_mm"]:
            continue
        found = profile(hu, axis)
        limit = row["step_hu"] * max(1.0, image.geometry.spacing[axis] / row["step_mm"])
        if not np.isnan(found.step).all():
            k = int(np.nanargmax(found.step))
            value = float(found.step[k])
            text = f"a step of {value:.0f} HU across a plane of {name} (between voxels {k} and {k + 1}){_of_tile(context, axis, k)}"
            findings.append(judged("seam", f"{name} step", value, text, high=limit, tell=context.compat))
        if not np.isnan(found.energy).all():
            k = int(np.nanargmax(found.energy))
            value = float(found.energy[k])
            text = f"gradients of {value:.2f} times those around at a plane of {name} (between voxels {k} and {k + 1})"
            findings.append(
                judged("seam", f"{name} energy", value, text + _of_tile(context, axis, k), high=row["energy"], tell=context.compat)
            )
        planes = (
            [] if context.tiles is None else [k for k in context.tiles[axis] if k < len(found.energy) and not np.isnan(found.energy[k])]
        )
        if planes:
            value = float(np.mean(found.energy[planes]))
            text = f"gradients of {value:.2f} times those around at the {len(planes)} tile planes of {name}"
            findings.append(judged("seam", f"{name} tiles", value, text, high=row["tiles"], tell=context.compat))
    return findings


def _of_tile(context: Context, axis: int, k: int) -> str:
    return ", where tiles meet" if context.tiles is not None and k in context.tiles[axis] else ""


def tile_planes(size: Sequence[int], window: Sequence[int], overlap: float, *, factor: int = 4) -> Planes:
    """Return the planes where windows of a sliding-window decoder begin and end.

    `size` is that of the image in voxels, `window` that of a window in latent voxels, of `factor` voxels each. Windows
    begin every `window * (1 - overlap)` latent voxels, and the last ends with the volume, as in MONAI.
    """
    found = []
    for n, w in zip(size, window, strict=True):
        length = -(-n // factor)
        roi = min(int(w), length)
        every = roi if roi == length else max(1, int(roi * (1 - overlap)))
        starts = {min(start, length - roi) for start in range(0, length - roi + every, every)}
        edges = {edge * factor - 1 for start in starts for edge in (start, start + roi)}
        found.append(tuple(sorted(edge for edge in edges if 0 <= edge < n - 1)))
    return found[0], found[1], found[2]
