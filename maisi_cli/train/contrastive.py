"""What the ControlNet's loss makes of a mask: weights of labels, and the region-contrastive loss of MAISI-v2.

Labels are (B, 1, X, Y, Z) at full resolution; predictions and targets (B, C, x, y, z) on the latent, to which labels are brought by
nearest neighbours (Guo et al. 2025, "MAISI-v2", section 3.3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_TINY = 1e-5


def nearest(values: Tensor, size: Sequence[int]) -> Tensor:
    """Return values (B, 1, X, Y, Z) at the voxels of a smaller grid, each that of its low corner: float32."""
    return functional.interpolate(values.float(), size=tuple(size), mode="nearest")


def weights(labels: Tensor, ids: Collection[int], weight: float, size: Sequence[int]) -> Tensor:
    """Return `weight` on latent voxels whose nearest label is one of `ids`, and 1 elsewhere: (B, 1, x, y, z)."""
    found = nearest(labels, size)
    chosen = torch.isin(found, torch.tensor(sorted(ids), dtype=found.dtype, device=found.device))
    return torch.where(chosen, weight, 1.0)


def regions(labels: Tensor, without: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return where two masks differ and, a voxel away from that, where they are the same: two (B, 1, x, y, z) of 0 and 1."""
    changed = (labels != without).float()
    grown = functional.max_pool3d(changed, 3, stride=1, padding=1)
    return nearest(changed, size), nearest(1 - grown, size)


def foreground(made: Tensor, without: Tensor, where: Tensor, delta: float) -> Tensor:
    """Return minus the mean difference of both predictions in the region, not below `-delta`: they are to differ there."""
    channels = made.shape[1]
    apart = -((made - without).abs() * where).sum() / (where.sum() * channels + _TINY)
    return torch.clamp(apart + delta, min=0) - delta


def background(without: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """Return the mean distance of the prediction without the lesion from the target, outside of the region."""
    channels = without.shape[1]
    return ((without - target).abs() * where).sum() / (where.sum() * channels + _TINY)
