"""MONAI's modules as they should run: the same weights and numbers, without what only costs time.

`native` is for training and inference: `MaisiGroupNorm3D`, a Python loop over groups, becomes `torch.nn.GroupNorm`, and
attention calls the fused kernel. `laid_out` is for inference alone: weights in the dtype that is computed in, norms in one
pass with the SiLU behind them, tensors in the layout that convolutions are fast in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import kernels
from .kernels import LAYOUT

EXACT = ("spacing_layer", "top_region_index_layer", "bottom_region_index_layer", "class_embedding")
"""Embeddings that are computed once for a sample: they stay in float32."""


_RETURNED_BYTES = 2**22


def free_at_once() -> None:
    """Let this process give memory of large tensors back to the system when they are freed, where the C library is glibc.

    It would keep blocks of up to 32 MiB, the size of a slab, in a heap that only grows: a decode then takes half as much again.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, _RETURNED_BYTES)  # M_MMAP_THRESHOLD: larger blocks are mapped, each on its own


def native(network: nn.Module, *, norms: bool = True, attention: bool = True) -> None:
    """Replace the norms and let the attention of a network of MONAI use torch's own, in place."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiGroupNorm3D

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if norms and isinstance(child, MaisiGroupNorm3D):
                made = nn.GroupNorm(child.num_groups, child.num_channels, eps=child.eps, affine=child.affine)
                made.load_state_dict(child.state_dict())
                setattr(parent, name, made)
        if attention and hasattr(parent, "use_flash_attention") and not getattr(parent, "save_attn", False):
            parent.use_flash_attention = True  # type: ignore[assignment]


def laid_out(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Move a network whose weights are loaded to `device` for inference in `dtype`; norms and `EXACT` stay in float32.

    Names of parameters stay what they are.
    """
    from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock

    network.to(device)
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential) and [type(part) for part in module.children()][:2] == [nn.GroupNorm, nn.SiLU]:
            module[0], module[1] = kernels.GroupNorm.of(module[0], silu=True), nn.Identity()  # type: ignore[arg-type]
        for name, child in list(module.named_children()):
            if isinstance(child, DiffusionUNetResnetBlock):
                setattr(module, name, ResBlock(child))
    for parent in list(network.modules()):
        if dtype != torch.float32 and getattr(parent, "attention_dtype", None) is not None:
            parent.attention_dtype = None  # type: ignore[assignment]  # fused attention adds up in float32 by itself
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                setattr(parent, name, kernels.GroupNorm.of(child, silu=False))
            elif type(child) is nn.Conv3d:
                setattr(parent, name, kernels.Conv3d.of(child))
            elif isinstance(child, nn.AvgPool3d):
                setattr(parent, name, HalfMean())
    for name, module in network.named_modules():
        if name.split(".")[0] in EXACT:
            continue
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            channels_last = device.type == "cuda" or dtype != torch.float32  # float32 on a processor is faster without
            module.to(dtype=dtype, memory_format=LAYOUT if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
        elif isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            module.to(dtype=dtype)
    return network


def recompute(network: nn.Module, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Let the residual blocks of a network of MONAI keep their input alone in training, and compute the rest again going back.

    Checkpointing (Chen et al. 2016), a block at a time; both times it runs within `around()`.
    """
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock
    from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock

    for module in network.modules():
        if isinstance(module, (DiffusionUNetResnetBlock, MaisiResBlock)):
            module.forward = _checkpointed(module.forward, around)  # type: ignore[method-assign]


def _checkpointed(whole: Callable[..., Tensor], around: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Tensor]:
    from torch.utils.checkpoint import checkpoint

    def within(*inputs: Tensor) -> Tensor:
        with around():
            return whole(*inputs)

    def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
        made: Tensor = checkpoint(within, *inputs, *named.values(), use_reentrant=False)
        return made

    return forward


class ResBlock(nn.Module):
    """MONAI's residual block with a time embedding, in fewer passes: norm with SiLU; biases, embedding, shortcut with a convolution."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = kernels.GroupNorm.of(block.norm1, silu=True), block.conv1
        self.time_emb_proj = block.time_emb_proj
        self.norm2, self.conv2 = kernels.GroupNorm.of(block.norm2, silu=True), block.conv2
        self.skip_connection = block.skip_connection
        self.up, self.downsample = block.upsample is not None, block.downsample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return (B, C, X, Y, Z) from (B, C', X, Y, Z) and the embedding (B, E); a batch shares its embedding or pays a pass."""
        h = self.norm1(x)
        if self.up:
            x, h = kernels.repeated(x), kernels.repeated(h)
        elif self.downsample is not None:
            x, h = self.downsample(x), self.downsample(h)
        time = self.time_emb_proj(functional.silu(emb))
        one = len(time) == 1
        h = kernels.convolution(h, self.conv1.conv, shift=time[0]) if one else self.conv1(h) + time[:, :, None, None, None]
        return kernels.convolution(self.norm2(h), self.conv2.conv, beside=[self.skip_connection(x)])


class HalfMean(nn.Module):
    """The mean of 2 x 2 x 2 voxels, as `AvgPool3d(2)`: torch has none in bfloat16 for a processor. Odd ends are left out."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, X // 2, Y // 2, Z // 2) in the dtype of `x`; sums are in float32."""
        x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2, : x.shape[4] // 2 * 2]
        total = x[:, :, ::2, ::2, ::2].float()
        for corner in range(1, 8):
            total = total + x[:, :, corner >> 2 :: 2, (corner >> 1) & 1 :: 2, corner & 1 :: 2]
        return (total / 8).to(x.dtype)
