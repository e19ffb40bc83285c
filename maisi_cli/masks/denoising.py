"""The mask networks: DDPM in the latent of the mask autoencoder, told ten anatomy sizes, and its decoder to labels.

The UNet takes the sizes as one context token; the decoder's 125 channels are taken to labels slab by slab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import networks, sampling, streaming
from ..anatomy import remap_table
from ..kernels import LAYOUT

if TYPE_CHECKING:
    from .sizes import Vector


def denoiser(nets: networks.Networks, sizes: Vector, *, compat: bool = False) -> sampling.Denoise:
    """Return `denoise(x, t)` of the mask UNet for a body of these sizes; with `compat` they are rounded to float16."""
    unet = nets.engines.get("mask_unet", nets.parts["mask_unet"])
    context = torch.tensor(sizes, dtype=torch.float32)
    if compat:
        context = context.half().float()
    context = context.reshape(1, 1, -1).to(nets.device)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        time = t.to(device=nets.device, dtype=torch.float32).reshape(1).expand(x.shape[0])
        with torch.inference_mode():
            half = x.to(dtype=nets.precision.dtype, memory_format=LAYOUT)
            made: Tensor = unet(half, timesteps=time, context=context.to(half.dtype).expand(x.shape[0], -1, -1))
        return made.float()

    return nets.capture()(denoise)


def decode(nets: networks.Networks, latent: Tensor, *, sweeps: str = "store", planes: int | None = None) -> NDArray[np.uint8]:
    """Decode a latent (1, 4, x, y, z) to the most likely channel of each voxel, (4x, 4y, 4z), 0..124.

    See `likeliest`.
    """
    z = (latent.to(nets.device) / nets.scale_factor).to(nets.precision.dtype)
    with torch.inference_mode():
        return likeliest(nets.parts["mask_vae"], z, sweeps=sweeps, planes=planes).cpu().numpy()


def likeliest(vae: Any, z: Tensor, *, sweeps: str = "store", planes: int | None = None) -> Tensor:
    """Return the most likely channel of each voxel, (4x, 4y, 4z) uint8, for a latent (1, 4, x, y, z) as the autoencoder has it.

    Slab by slab and exactly (`streaming.decoded`): the channels are held for one slab at a time, of `planes` planes. A softmax
    would not change which one is largest.
    """
    slabs = streaming.decoded(vae, z, mode=sweeps, planes=planes)
    return torch.cat([channels[0].argmax(dim=0).to(torch.uint8) for channels in slabs])


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
