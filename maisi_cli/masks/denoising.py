"""The mask networks: DDPM in the latent of the mask autoencoder, told ten anatomy sizes, and its decoder to labels.

The UNet takes the sizes as one context token; the decoder's 125 channels are taken to labels slab by slab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import networks, sampling
from ..anatomy import remap_table

if TYPE_CHECKING:
    from .sizes import Vector

SLAB = 8
"""Planes of the decoder's channels that are held at once."""


def denoiser(nets: networks.Networks, sizes: Vector, *, compat: bool = False) -> sampling.Denoise:
    """Return `denoise(x, t)` of the mask UNet for a body of these sizes; with `compat` they are rounded to float16."""
    unet = nets.parts["mask_unet"]
    context = torch.tensor(sizes, dtype=torch.float32)
    if compat:
        context = context.half().float()
    context = context.reshape(1, 1, -1).to(nets.device)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        time = t.to(device=nets.device, dtype=torch.float32).reshape(1).expand(x.shape[0])
        with torch.inference_mode(), nets.precision(nets.device):
            made: Tensor = unet(x, timesteps=time, context=context.expand(x.shape[0], -1, -1))
        return made.float()

    return denoise


def decode(nets: networks.Networks, latent: Tensor, *, slab: int = SLAB) -> NDArray[np.uint8]:
    """Decode a latent (1, 4, x, y, z) to the most likely channel of each voxel, (4x, 4y, 4z), 0..124.

    The decoder runs on the whole volume up to its last convolution, whose channels are made `slab` planes at a time and
    never held for more; a softmax would not change which one is largest.
    """
    vae: Any = nets.parts["mask_vae"]
    with torch.inference_mode(), nets.precision(nets.device):
        features = vae.post_quant_conv(latent.to(nets.device) / nets.scale_factor)
        *blocks, last = vae.decoder.blocks
        for block in blocks:
            features = block(features)
        planes = features.shape[2]
        found = torch.empty(features.shape[2:], dtype=torch.uint8)
        for start in range(0, planes, slab):
            stop = min(start + slab, planes)
            low, high = max(start - 1, 0), min(stop + 1, planes)  # the kernel reaches one plane further
            channels = last(features[:, :, low:high])[0, :, start - low : stop - low]
            found[start:stop] = channels.argmax(dim=0).to(torch.uint8).cpu()
    return found.numpy()


def to_labels(channels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return channels of the mask autoencoder as MAISI ids."""
    table = np.array(remap_table("raw125").table(), dtype=np.uint8)
    return table[channels]


def sample(
    nets: networks.Networks, sizes: Vector, noise: Tensor, *, steps: int = 1000, generator: sampling.Noise | None = None,
    on_step: sampling.OnStep | None = None, compat: bool = False,
) -> Tensor:  # fmt: skip
    """Denoise the latent of a mask for a body of these sizes with DDPM."""
    schedule = sampling.ddpm_schedule(steps, noise.shape[2:], compat=compat)
    return sampling.ddpm(denoiser(nets, sizes, compat=compat), noise.to(nets.device), schedule, on_step=on_step, generator=generator)
