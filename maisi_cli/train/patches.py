"""Patches of volumes for the autoencoder: reading, spacing, intensity, and random changes of shape and intensity.

The changes are those of the reference (reference.md 5.1), by MONAI's transforms; but that a random scale multiplies by 0.9 to 1.1,
which its notebook means and its numbers, 1.9 to 2.1, do not say. Every random number comes from the generator that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ..catalog import modality
from ..errors import UsageError
from ..geometry import Geometry, Size
from ..volumes import Volume, onto, read_image, read_mask, resample_labels
from .encoding import intensity
from .lists import Case
from .settings import TrainSettings

AIR = {"ct": -1000.0, "mr": 0.0}
_CHANGED = 0.3
"""How often zoom, rotation, scale and shift are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A volume in memory: HU as int16 for CT, intensities as float16 for MR."""

    id: str
    kind: str
    array: NDArray[Any]
    geometry: Geometry

    def intensities(self, part: NDArray[Any]) -> NDArray[np.float32]:
        """Return what the network is shown for a part of the array."""
        return intensity(part.astype(np.float32)) if self.kind == "ct" else part.astype(np.float32)


class Volumes:
    """The volumes of some cases: a share `cache` stays in memory, the others are read each time."""

    def __init__(self, cases: Sequence[Case], settings: TrainSettings) -> None:
        self.cases, self.settings = list(cases), settings
        self._kept: dict[int, Source] = {}
        for number in range(round(settings.cache * len(self.cases))):
            self._kept[number] = read(self.cases[number], settings)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, number: int) -> Source:
        return self._kept.get(number) or read(self.cases[number], self.settings)

    def patch(self, size: Size, rng: np.random.Generator) -> tuple[str, NDArray[np.float32]]:
        """Return the id of a random case and a random patch of it, (X, Y, Z) of `size`; of up to four, one that is not mostly air."""
        source = self[int(rng.integers(len(self)))]
        for _attempt in range(4):
            part = _zoomed(source, size, rng, zoom=self.settings.random_aug and self.settings.spacing_type == "rand_zoom")
            shown = source.intensities(part)
            if (shown > 0.5).mean() > 0.15 or source.kind == "mr":
                break
        for axis in range(3):
            if rng.random() < 0.5:
                shown = np.flip(shown, axis)
        shown = np.ascontiguousarray(shown)
        return source.id, changed(shown, source.kind, rng) if self.settings.random_aug else shown


def read(case: Case, settings: TrainSettings) -> Source:
    """Read the image of a case, at the spacing that is asked for. Raises `UsageError` for a case without an image."""
    if case.image is None:
        raise UsageError(f"case {case.id} has no image", hint="give every case of the list an image")
    kind = modality(case.modality).kind
    volume = read_image(case.image, modality="ct" if kind == "ct" else case.modality, channel=settings.select_channel)
    if settings.spacing_type == "fixed":
        assert settings.spacing is not None
        volume = respaced(volume, settings.spacing)
    array = volume.array
    if kind == "ct":
        return Source(id=case.id, kind=kind, array=np.clip(array, -1024, 3000).astype(np.int16), geometry=volume.geometry)
    return Source(id=case.id, kind="mr", array=intensity(array, "mr").astype(np.float16), geometry=volume.geometry)


def respaced(volume: Volume, spacing: Sequence[float]) -> Volume:
    """Return a volume resampled to a spacing in mm, trilinear, its field of view kept within half a voxel."""
    size = [max(1, round(n * old / new)) for n, old, new in zip(volume.geometry.size, volume.geometry.spacing, spacing, strict=True)]
    return onto(volume, volume.geometry.resized((size[0], size[1], size[2])))


def labels_of(case: Case, geometry: Geometry) -> NDArray[np.uint8] | None:
    """Return the label map of a case on the grid of its image, each voxel the nearest; None where it has none of that field of view."""
    if case.label is None or case.label.suffix == ".npy":
        return None
    mask = read_mask(case.label)
    same = all(abs(a - b) <= c for a, b, c in zip(mask.geometry.fov_mm, geometry.fov_mm, geometry.spacing, strict=True))
    return resample_labels(mask, geometry.size).array if same else None


def _crop(source: Source, size: Size, rng: np.random.Generator) -> NDArray[Any]:
    volume = source.array
    if any(n < want for n, want in zip(volume.shape, size, strict=True)):
        widths = [(0, max(0, want - n)) for n, want in zip(volume.shape, size, strict=True)]
        volume = np.pad(volume, widths, constant_values=AIR[source.kind])
    start = [int(rng.integers(n - want + 1)) for n, want in zip(volume.shape, size, strict=True)]
    return volume[tuple(slice(s, s + want) for s, want in zip(start, size, strict=True))]


def _zoomed(source: Source, size: Size, rng: np.random.Generator, *, zoom: bool) -> NDArray[Any]:
    """Return a random patch; with `zoom` now and then magnified 0.5 to 1.5 times, and turned by up to 0.1 about each axis."""
    larger = zoom and rng.random() < _CHANGED
    factor = float(rng.uniform(0.5, 1.5)) if larger else 1.0
    turned = zoom and rng.random() < _CHANGED
    if not (larger or turned):
        return _crop(source, size, rng)
    wide = [max(4, round(n / factor * (1.2 if turned else 1.0))) for n in size]
    part = torch.from_numpy(_crop(source, (wide[0], wide[1], wide[2]), rng).astype(np.float32))[None]
    if turned:
        from monai.transforms import Rotate

        angles = [float(each) for each in rng.uniform(-0.1, 0.1, 3)]
        part = torch.as_tensor(Rotate(angles, keep_size=True, padding_mode="border")(part)).as_subclass(torch.Tensor)
        inner = [round(n / factor) for n in size]
        x, y, z = (slice((w - n) // 2, (w - n) // 2 + n) for w, n in zip(wide, inner, strict=True))
        part = part[:, x, y, z]
    made = functional.interpolate(part[None], size=tuple(size), mode="trilinear", align_corners=False)[0, 0]
    return made.numpy()


def changed(patch: NDArray[np.float32], kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a patch (X, Y, Z) with its intensity changed at random, and turned by right angles."""
    from monai import transforms as t

    found: list[Any] = []
    if kind == "mr":
        found += [t.RandBiasField(prob=0.3, coeff_range=(0.0, 0.3)), t.RandGibbsNoise(prob=0.3, alpha=(0.5, 1.0)),
                  t.RandAdjustContrast(prob=0.3, gamma=(0.5, 2.0)), t.RandHistogramShift(prob=0.05, num_control_points=10)]  # fmt: skip
    for plane in ((0, 1), (1, 2), (0, 2)):
        if patch.shape[plane[0]] == patch.shape[plane[1]]:
            found.append(t.RandRotate90(prob=0.5, spatial_axes=plane))
    found += [t.RandScaleIntensity(prob=_CHANGED, factors=(-0.1, 0.1)), t.RandShiftIntensity(prob=_CHANGED, offsets=(-0.05, 0.05))]
    made = torch.from_numpy(patch)[None]
    for transform in found:
        transform.set_random_state(seed=int(rng.integers(2**31)))
        made = torch.as_tensor(transform(made)).as_subclass(torch.Tensor)
    return made[0].float().numpy()
