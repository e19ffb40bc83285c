"""Losses, each a plain function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError


def distance(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Return the mean absolute (`l1`) or squared (`l2`) difference, in float32."""
    difference = prediction.float() - target.float()
    if kind == "l1":
        return difference.abs().mean()
    if kind == "l2":
        return difference.square().mean()
    raise UsageError(f"there is no loss {kind!r}", hint="use l1 or l2")


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """Return KL(N(mean, sigma^2) || N(0, 1)): half of the sum of mu^2 + sigma^2 - log sigma^2 - 1, averaged over the batch."""
    variance = sigma.float().square()
    each = 0.5 * (mean.float().square() + variance - torch.log(variance + 1e-10) - 1)
    return each.sum() / mean.shape[0]


def window(intensity: Tensor, low_hu: float = -200.0, high_hu: float = 300.0) -> Tensor:
    """Return intensities of [-1000, 1000] HU scaled to [0, 1] as seen in a HU window, again in [0, 1] units of the window."""
    low, high = (low_hu + 1000) / 2000, (high_hu + 1000) / 2000
    return ((intensity - low) / (high - low)).clamp(0, 1)


def edge_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring-voxel differences along the three axes of (B, C, X, Y, Z)."""
    total = prediction.new_zeros((), dtype=torch.float32)
    for axis in (2, 3, 4):
        total = total + (prediction.float().diff(dim=axis) - target.float().diff(dim=axis)).abs().mean()
    return total / 3
