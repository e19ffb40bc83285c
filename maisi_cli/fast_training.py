"""Networks that train fast: MONAI's modules with other forward passes, and the same parameters, names and numbers to rounding.

A group norm and the SiLU behind it are one function that keeps nothing but its input, in the dtype that is computed in, and a
few statistics; volumes are channels-last; nothing is turned into float32 under autocast but inside of a norm, a piece at a time.
Modules stay where they are and change their class, so that hooks, parameters and whoever asks for MONAI's classes find theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import inference
from .kernels import LAYOUT, PIECE, Affine, Moments, rows_of

PIECE_ELSEWHERE = 2**24
"""Values that are worked on at once where there is no small cache to stay in: their copies in float32 are small beside a volume."""


def pays(network: nn.Module, device: torch.device) -> bool:
    """Say whether a network trains faster so on a device: on CUDA every one, on a processor autoencoders.

    Diffusion models were measured slower on a processor (MONAI's steps took 0.4 to 0.7 of the time): their latents are small, and
    casting and reordering weights is most of the work.
    """
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    return device.type == "cuda" or isinstance(network, AutoencoderKL)


def trainable(network: nn.Module) -> nn.Module:
    """Let a network of MONAI (autoencoder, diffusion model or ControlNet) train fast, in place; return it."""
    classes = _classes()
    inference.native(network, norms=False)
    for module in list(network.modules()):
        found = classes.get(type(module))
        if found is not None and _suits(module):
            module.__class__ = found  # a module knows its forward pass by its class; all that it holds stays
        if getattr(module, "attention_dtype", None) is not None:
            module.attention_dtype = None  # type: ignore[assignment]  # fused attention adds up in float32 by itself
    for module in list(network.modules()):
        for norm in _followed(module):
            norm.silu = True
    for name in ("quant_conv_mu", "quant_conv_log_sigma"):
        if hasattr(network, name):  # noise is drawn in the layout of these: as MONAI draws it
            getattr(network, name).conv.layout = torch.contiguous_format
    return network


def _suits(module: Any) -> bool:
    """Say whether a module is what this file has a forward pass for: x sigmoid(x) without a factor, a mean of 2 x 2 x 2 voxels."""
    if isinstance(module, nn.AvgPool3d):
        return (module.kernel_size, module.stride, module.padding) == (2, 2, 0) and not module.ceil_mode
    return getattr(module, "alpha", 1) == 1


def _followed(module: nn.Module) -> list[GroupNorm]:
    """Return the norms of a module behind which it has a SiLU, which is theirs from now on."""
    if isinstance(module, (_Residual, _TimeResidual)):
        return [module.norm1, module.norm2]  # type: ignore[list-item]
    if isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[0], GroupNorm) and isinstance(module[1], nn.SiLU):
        module[1] = nn.Identity()
        return [module[0]]
    return []


# --- norm and SiLU --------------------------------------------------------------------------------------------------


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = True) -> Tensor:
    """Return the group norm of volumes (B, C, X, Y, Z), and its SiLU, in the dtype of `x`; differentiable once.

    Sums are in float64 over pieces in float32, and all in float64 where `x` is.
    """
    if torch.compiler.is_compiling():  # which fuses it, and decides itself what to keep
        wide = x if x.dtype == torch.float64 else x.float()
        with _exactly(x.device.type):
            y = functional.group_norm(wide, groups, weight.to(wide.dtype), bias.to(wide.dtype), eps)
            return (functional.silu(y) if silu else y).to(x.dtype)
    made: Tensor = _NormSilu.apply(x.contiguous(memory_format=LAYOUT), weight, bias, groups, eps, silu)
    return made


class _NormSilu(torch.autograd.Function):
    """Keeps the input and two numbers of each group; what lies between is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        with _exactly(x.device.type):
            means, deviations = zip(*(_statistics(one, groups, eps) for one in x.split(1)), strict=True)
            mean, inverse = torch.stack(means), torch.stack(deviations)
            made = torch.empty_like(x, memory_format=LAYOUT)
            for one, target, scale, shift in zip(x.split(1), made.split(1), *_maps(mean, inverse, weight, bias), strict=True):
                if x.dtype == torch.float64:
                    y = torch.addcmul(shift, rows_of(one), scale)
                    rows_of(target).copy_(functional.silu(y) if silu else y)
                else:
                    Affine(scale=scale.float(), shift=shift.float(), silu=silu).into(one, target)
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        ctx.silu = silu
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight, bias = ctx.saved_tensors
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        gradient = gradient.contiguous(memory_format=LAYOUT)
        made = torch.empty_like(x, memory_format=LAYOUT)
        of_weight, of_bias = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(bias, dtype=torch.float64)
        with _exactly(x.device.type):
            scales, shifts = _maps(mean, inverse, weight, bias)
            for k in range(len(x)):
                rows = (rows_of(x[k : k + 1]), rows_of(gradient[k : k + 1]), rows_of(made[k : k + 1]))
                spread = weight.numel() // mean.shape[1]
                centre, narrow = (each[k].repeat_interleave(spread) for each in (mean, inverse))
                first, second = _into_norm(*rows, scales[k].to(wide), shifts[k].to(wide), centre.to(wide), silu=ctx.silu)
                second *= narrow  # the sum of gradient times normalised value, of each channel
                of_bias += first
                of_weight += second
                count = len(rows[0]) * spread
                through = torch.stack([first, second]) * weight.double()
                one, other = (through.reshape(2, -1, spread).sum(dim=2) / count).repeat_interleave(spread, dim=1)
                slope, level = -narrow.square() * other, narrow.square() * other * centre - narrow * one
                _through_norm(rows[0], rows[2], (narrow * weight.double()).to(wide), slope.to(wide), level.to(wide))
        return made, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and inverse deviation of the groups of one volume, in float64."""
    if x.dtype == torch.float64:
        variance, mean = torch.var_mean(x.reshape(groups, -1), dim=1, correction=0)
        return mean, (variance + eps).rsqrt()
    moments = Moments()
    moments.add(x)
    return moments.statistics(groups, eps)


def _maps(mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift (B, C) in float64 that the norm of each volume comes to."""
    spread = weight.numel() // mean.shape[1]
    scale = inverse.repeat_interleave(spread, dim=1) * weight.double()
    return scale, bias.double() - mean.repeat_interleave(spread, dim=1) * scale


def _into_norm(
    x: Tensor, gradient: Tensor, out: Tensor, scale: Tensor, shift: Tensor, centre: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradient before the SiLU to the rows `out`; return its sums over rows, and those of it times `x - centre`."""
    wide, step = scale.dtype, _piece(x)
    first, second = (torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    for start in range(0, len(x), step):
        here = slice(start, start + step)
        given, values = gradient[here].to(wide), x[here].to(wide)
        if silu:
            given = torch.ops.aten.silu_backward(given, torch.addcmul(shift, values, scale))
            out[here] = given
        else:
            out[here] = gradient[here]
        first += _summed(given)
        second += _summed(torch.mul(values.sub(centre), given))
    return first, second


def _through_norm(x: Tensor, out: Tensor, scale: Tensor, slope: Tensor, level: Tensor) -> None:
    """Turn the gradient in the rows `out` into that of the norm's input: `scale` of it, plus `slope` of the input, plus `level`."""
    step = _piece(x)
    for start in range(0, len(x), step):
        here = slice(start, start + step)
        out[here] = torch.addcmul(torch.addcmul(level, x[here].to(scale.dtype), slope), out[here].to(scale.dtype), scale)


def _summed(rows: Tensor) -> Tensor:
    if rows.device.type == "cpu":  # sums of rows are products with ones: much faster
        return (torch.ones(1, len(rows), dtype=rows.dtype) @ rows)[0]
    return rows.sum(dim=0)


def _piece(rows: Tensor) -> int:
    return max(1, (PIECE if rows.device.type == "cpu" else PIECE_ELSEWHERE) // rows.shape[1])


def _exactly(device: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast changes no dtype; there is none on the device `meta`."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class GroupNorm(nn.GroupNorm):
    """A group norm, and the SiLU behind it where `silu` says so."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised volumes (B, C, X, Y, Z) in the dtype of `x`."""
        if x.dim() != 5 or self.weight is None:
            y = super().forward(x)
            return functional.silu(y) if self.silu else y
        return norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)


# --- layers ---------------------------------------------------------------------------------------------------------


class Conv3d(nn.Conv3d):
    """A convolution of channels-last volumes to such, whose weights lie as they did: the state of a run and FSDP depend on it."""

    layout = LAYOUT

    def forward(self, x: Tensor) -> Tensor:
        """Return what `torch.nn.Conv3d` returns, in `layout`, for which a volume of one channel tells torch nothing."""
        return super().forward(x.contiguous(memory_format=LAYOUT)).contiguous(memory_format=self.layout)


class Halved(nn.AvgPool3d):
    """The mean of 2 x 2 x 2 voxels in the dtype of the volume: torch has none in bfloat16 for a processor."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, X // 2, Y // 2, Z // 2)."""
        made: Tensor = _Halved.apply(x)
        return made


class _Halved(torch.autograd.Function):
    """Sums are in float32; odd ends are left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2, : x.shape[4] // 2 * 2]
        total = x[:, :, ::2, ::2, ::2].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        for corner in range(1, 8):
            total = total + x[:, :, corner >> 2 :: 2, (corner >> 1) & 1 :: 2, corner & 1 :: 2]
        return (total / 8).to(x.dtype).contiguous(memory_format=LAYOUT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        made = functional.interpolate((gradient / 8).contiguous(memory_format=LAYOUT), scale_factor=2.0, mode="nearest")
        lacking = [n - m for n, m in zip(ctx.shape[2:], made.shape[2:], strict=True)]
        return functional.pad(made, [part for n in reversed(lacking) for part in (0, n)]) if any(lacking) else made


def enlarged(x: Tensor, mode: str) -> Tensor:
    """Return volumes at twice their resolution, `nearest` or `trilinear`, in their dtype, which autocast would widen."""
    with _exactly(x.device.type):
        return functional.interpolate(x, scale_factor=2.0, mode=mode).contiguous(memory_format=LAYOUT)


class _Residual(nn.Module):
    """The forward pass of a residual block of an autoencoder, in which norms have their SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        h = block.conv2(block.norm2(block.conv1(block.norm1(x))))
        return h + (x if block.in_channels == block.out_channels else block.nin_shortcut(x))  # type: ignore[no-any-return]


class _TimeResidual(nn.Module):
    """The forward pass of a residual block of a diffusion model, in which norms have their SiLU."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        block: Any = self
        h = block.norm1(x)
        if block.upsample is not None:
            x, h = enlarged(x, "nearest"), enlarged(h, "nearest")
        elif block.downsample is not None:
            x, h = block.downsample(x), block.downsample(h)
        h = block.conv1(h) + block.time_emb_proj(functional.silu(emb))[:, :, None, None, None]
        return block.skip_connection(x) + block.conv2(block.norm2(h))  # type: ignore[no-any-return]


class _Upsample(nn.Module):
    """The forward pass of an autoencoder's upsampling."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        return block.conv(x if block.use_convtranspose else enlarged(x, "trilinear"))  # type: ignore[no-any-return]


class _AttentionDown(nn.Module):
    """The forward pass of a level on the way down with self-attention; volumes stay channels-last."""

    def forward(self, hidden_states: Tensor, temb: Tensor, context: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        level: Any = self
        made = []
        for residual, attention in zip(level.resnets, level.attentions, strict=True):
            hidden_states = attention(residual(hidden_states, temb))
            made.append(hidden_states)
        if level.downsampler is not None:
            hidden_states = level.downsampler(hidden_states, temb)
            made.append(hidden_states)
        return hidden_states, made


class _AttentionMiddle(nn.Module):
    """The forward pass of the middle with self-attention."""

    def forward(self, hidden_states: Tensor, temb: Tensor, context: Tensor | None = None) -> Tensor:
        level: Any = self
        return level.resnet_2(level.attention(level.resnet_1(hidden_states, temb)), temb)  # type: ignore[no-any-return]


class _AttentionUp(nn.Module):
    """The forward pass of a level on the way up with self-attention."""

    def forward(
        self, hidden_states: Tensor, res_hidden_states_list: Sequence[Tensor], temb: Tensor, context: Tensor | None = None
    ) -> Tensor:
        level: Any = self
        for residual, attention, beside in zip(level.resnets, level.attentions, reversed(res_hidden_states_list), strict=False):
            hidden_states = attention(residual(torch.cat([hidden_states, beside], dim=1), temb))
        return hidden_states if level.upsampler is None else level.upsampler(hidden_states, temb)  # type: ignore[no-any-return]


class _Swish(nn.Module):
    """x sigmoid(x) that keeps its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


@cache
def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Return what each class of MONAI's and torch's becomes: itself, with a forward pass of this file."""
    from monai.apps.generation.maisi.networks import autoencoderkl_maisi as maisi
    from monai.networks.blocks.activation import Swish
    from monai.networks.nets import autoencoderkl as plain
    from monai.networks.nets import diffusion_model_unet as unet

    own: dict[type[nn.Module], type[nn.Module]] = {
        maisi.MaisiResBlock: _Residual, plain.AEKLResBlock: _Residual, unet.DiffusionUNetResnetBlock: _TimeResidual,
        maisi.MaisiUpsample: _Upsample, unet.AttnDownBlock: _AttentionDown, unet.AttnMidBlock: _AttentionMiddle,
        unet.AttnUpBlock: _AttentionUp,
    }  # fmt: skip
    made = {theirs: type(theirs.__name__, (ours, theirs), {"__module__": __name__}) for theirs, ours in own.items()}
    return {**made, maisi.MaisiGroupNorm3D: GroupNorm, nn.GroupNorm: GroupNorm, nn.Conv3d: Conv3d, nn.AvgPool3d: Halved, Swish: _Swish}
