"""Training in less memory: residual blocks keep their input alone and compute the rest again on the way back."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError


def recompute(network: nn.Module) -> int:
    """Let the residual blocks of a network recompute their activations (Chen et al. 2016); return how many there are.

    Weights, names and numbers stay what they are. Raises `UsageError` for a network without such blocks.
    """
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock
    from monai.networks.nets.autoencoderkl import AEKLResBlock
    from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock

    blocks = [module for module in network.modules() if isinstance(module, (MaisiResBlock, AEKLResBlock, DiffusionUNetResnetBlock))]
    if not blocks:
        raise UsageError("this network has no residual blocks to recompute", hint="set train.recompute=false")
    for block in blocks:
        if not isinstance(block.forward, functools.partial):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return len(blocks)
