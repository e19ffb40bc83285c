"""From volumes to the slices that a feature extractor sees: named, hashed preprocessing profiles.

A profile says everything that happens between a file and a network, so that two sets of features can be compared only
when theirs agree. `reference` is what the published 2.5D FIDs of MAISI were computed with; `ct` and `mr` are ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError, unknown
from .geometry import Size, Triple
from .volumes import AIR_HU, Volume

PLANES = ("xy", "yz", "zx")
_AXIS = {"xy": 2, "yz": 0, "zx": 1}
_EPSILON = 1e-10
SCALINGS = ("stack", "window")

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How volumes become slices.

    `spacing_mm`: resampled to it (trilinear) when set. `target_shape`: padded with `fill` and cropped to it about the
    centre when set. `clip`: values outside become its ends; None for MR, where the ends are the 0.5th and 99.5th percentile
    of each volume. `center_slices`: share of the slices in the middle of each axis that are used, None for all; of those
    every `every`-th. `scaling`: `stack` maps the lowest and highest value of a plane's slices of one volume to 0 and 1,
    which hides a shift of all HU; `window` maps the ends of `clip` to -1 and 1. `subtract`: one number a channel, taken off
    after scaling; the channels are copies of one another. `drop_below`: slices whose highest value, in HU, lies below
    are left out; the scale is still that of the whole stack. `order`: which volumes `num_images` takes, the first by name or a random draw.
    """

    name: str
    spacing_mm: Triple | None = None
    target_shape: Size | None = None
    fill: float = float(AIR_HU)
    clip: tuple[float, float] | None = (-1000.0, 1000.0)
    center_slices: float | None = None
    every: int = 1
    scaling: str = "window"
    subtract: tuple[float, ...] = (0.0,)
    drop_below: float | None = None
    order: str = "random"

    def __post_init__(self) -> None:
        if self.center_slices is not None and not 0 < self.center_slices <= 1:
            raise UsageError(f"the share of centre slices {self.center_slices:g} is not in 0..1", hint="use for example 0.4")
        if self.scaling not in SCALINGS or self.order not in ("random", "sorted") or self.every < 1:
            raise ValueError("not a profile")

    @property
    def sha256(self) -> str:
        """The hash of everything but the name, so that equal preprocessing compares equal under any name."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the profile for JSON, with its hash."""
        return {**dataclasses.asdict(self), "sha256": self.sha256}

    def changed(self, **values: Any) -> Profile:
        """Return the profile with other values; one that differs is called `NAME (changed)`."""
        other = replace(self, **values)
        return self if other.sha256 == self.sha256 else replace(other, name=f"{self.name.removesuffix(' (changed)')} (changed)")


# fmt: off
PROFILES: dict[str, Profile] = {
    each.name: each for each in (
        Profile(name="reference", target_shape=(512, 512, 512), scaling="stack", subtract=(0.406, 0.456, 0.485), order="sorted"),
        Profile(name="reference-mr", target_shape=(512, 512, 512), fill=0.0, clip=None, scaling="stack",
                subtract=(0.406, 0.456, 0.485), order="sorted"),
        Profile(name="ct", spacing_mm=(3.0, 3.0, 3.0)),
        Profile(name="mr", spacing_mm=(3.0, 3.0, 3.0), fill=0.0, clip=None),
    )
}
# fmt: on


def profile(name: str) -> Profile:
    """Return a profile by name. Raises `UsageError` with near matches."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES, see="maisi fid --help")
    return PROFILES[name]


def prepared(volume: Volume, profile: Profile) -> Array:
    """Return a volume resampled, padded, cropped and clipped as the profile says, float32 (X, Y, Z) in RAS+ order."""
    array: Array = volume.array.astype(np.float32, copy=False)
    if profile.spacing_mm is not None:
        array = _resampled(array, volume.geometry.spacing, profile.spacing_mm)
    if profile.target_shape is not None:
        array = _fitted(array, profile.target_shape, profile.fill)
    low, high = profile.clip or (float(value) for value in np.percentile(array, (0.5, 99.5)))
    return np.clip(array, low, high)


def _resampled(array: Array, old: Triple, new: Triple) -> Array:
    """Return the array on another spacing, interpolated as MONAI's `Spacing` does it (bilinear, border padding)."""
    if np.allclose(old, new, rtol=1e-6):
        return array
    import torch
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Spacing as Resample

    grid = MetaTensor(
        torch.from_numpy(np.ascontiguousarray(array))[None], affine=torch.diag(torch.tensor([*old, 1.0], dtype=torch.float64))
    )
    out = Resample(pixdim=new, mode="bilinear")(grid)
    return np.asarray(torch.as_tensor(out[0]), dtype=np.float32)


def _fitted(array: Array, size: Size, fill: float) -> Array:
    """Return the array padded and then cropped to a size about its centre, as MONAI's SpatialPad and CenterSpatialCrop."""
    widths = [(max(new - old, 0) // 2, max(new - old, 0) - max(new - old, 0) // 2) for old, new in zip(array.shape, size, strict=True)]
    array = np.pad(array, widths, constant_values=fill)
    firsts = [max(n // 2 - new // 2, 0) for n, new in zip(array.shape, size, strict=True)]
    window = tuple(slice(first, first + new) for first, new in zip(firsts, size, strict=True))
    return np.ascontiguousarray(array[window])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The slices of one plane of one prepared volume; `batches` gives them to a network a few at a time.

    `low` and `high` are those of the whole stack, so that the size of a batch changes nothing.
    """

    array: Array
    plane: str
    profile: Profile

    @property
    def slices(self) -> Array:
        """The slices that are used, (n, H, W), a view of the array."""
        along = np.moveaxis(self.array, _AXIS[self.plane], 0)
        n, share = len(along), self.profile.center_slices
        first, last = (0, n) if share is None else (int((1 - share) / 2 * n), int((1 + share) / 2 * n))
        return along[first : last : self.profile.every]

    def batches(self, size: int) -> Iterator[Array]:
        """Yield the slices, scaled, as (n, channels, H, W) float32 with n at most `size`.

        H and W are X and Y for `xy`, Y and Z for `yz`, X and Z for `zx`.
        """
        stack, profile = self.slices, self.profile
        if not len(stack):
            return
        if profile.scaling == "stack" or profile.clip is None:
            low, high = float(stack.min()), float(stack.max())
        else:
            low, high = profile.clip
        shift = np.asarray(profile.subtract, dtype=np.float32)[:, None, None]
        for start in range(0, len(stack), size):
            part = stack[start : start + size].astype(np.float32)
            if profile.drop_below is not None:
                part = part[part.max(axis=(1, 2)) >= profile.drop_below]
            part = (part - np.float32(low)) / np.float32(high - low + _EPSILON)
            if profile.scaling == "window":
                part = 2 * part - 1
            if len(part):
                yield np.ascontiguousarray(part[:, None] - shift)


def stacks(volume: Volume, profile: Profile) -> dict[str, Stack]:
    """Return the slices of a volume by plane: `xy`, `yz`, `zx`."""
    array = prepared(volume, profile)
    return {plane: Stack(array=array, plane=plane, profile=profile) for plane in PLANES}
