"""The patch discriminator of the autoencoder: least squares on whether each patch looks real (Isola et al. 2017; Mao et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def discriminator(channels: int = 32, layers: int = 3) -> nn.Module:
    """Build MONAI's 3D patch discriminator with instance norms, as published: 2.77 million weights at 32 channels."""
    from monai.networks.nets import PatchDiscriminator

    made: nn.Module = PatchDiscriminator(
        spatial_dims=3, num_layers_d=layers, channels=channels, in_channels=1, out_channels=1, norm="INSTANCE"
    )
    return made


def judged(opponent: nn.Module, volume: Tensor) -> Tensor:
    """Return the last map of a discriminator for volumes (B, 1, X, Y, Z)."""
    made: Any = opponent(volume)
    found: Tensor = made[-1]
    return found


def least_squares(found: Tensor, real: bool) -> Tensor:
    """Return the mean squared distance from 1 (real) or 0 (made), after a leaky ReLU of slope 0.05 as MONAI's loss has it."""
    shown = torch.nn.functional.leaky_relu(found.float(), 0.05)
    return (shown - (1.0 if real else 0.0)).square().mean()


def opponent_loss(opponent: nn.Module, made: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return half of the sum of both distances, and each."""
    fake, true = least_squares(judged(opponent, made.detach()), False), least_squares(judged(opponent, real), True)
    return 0.5 * (fake + true), {"fake": fake.detach(), "real": true.detach()}
