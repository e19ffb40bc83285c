"""What networks do between their convolutions, each in one pass over a volume: norm with SiLU, bias with shortcut, doubling.

A group norm is two passes over rows of channels: the moments of a volume, then one affine map for each channel. Rows are
what a volume (1, C, X, Y, Z) in the layout channels-last is in memory: (X Y Z, C). On CUDA all of this is Triton kernels where
Triton is there; elsewhere it is torch operations on pieces that stay in a processor's cache. Arithmetic is in float32 whatever
the dtype of the volume, sums over pieces in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYOUT = torch.channels_last_3d
"""Of volumes in memory: convolutions of thin slabs are fast in it, and a norm reads whole rows of channels."""

PIECE = 2**17
"""Values that a processor works on at once: they and what is made of them stay in its cache."""
SAMPLES = 256
"""Rows whose mean stands for that of the volume where sums are taken around it."""


def rows_of(x: Tensor) -> Tensor:
    """Return (1, C, X, Y, Z) as rows (X Y Z, C): a view where the layout is channels-last."""
    return x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return volumes that follow each other along x as one; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=2)


@dataclass(frozen=True, slots=True)
class Affine:
    """What a group norm comes to once its statistics are known: scale and shift (C,) in float32, then SiLU or nothing."""

    scale: Tensor
    shift: Tensor
    silu: bool

    def apply(self, x: Tensor) -> Tensor:
        """Return the normalised volume (1, C, X, Y, Z) in the dtype of `x`."""
        made = torch.empty_like(x, memory_format=LAYOUT)
        self.into(x, made)
        return made

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the normalised volume to `out`, of the same shape and dtype, each of whose planes is channels-last."""
        rows, target = rows_of(x), out.permute(0, 2, 3, 4, 1).view(-1, x.shape[1])
        if triton := _triton(x.device.type):
            triton.normalise(rows, self.scale, self.shift, target, silu=self.silu)
            return
        step = _piece(rows)
        for start in range(0, len(rows), step):
            y = torch.addcmul(self.shift, rows[start : start + step].float(), self.scale)
            target[start : start + step] = functional.silu(y, inplace=True) if self.silu else y


@dataclass(slots=True)
class Moments:
    """Sums of a volume's values and of their squares for each channel, around a centre near the mean, in float64."""

    count: int = 0
    centre: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take the planes (1, C, ...) into account."""
        rows = rows_of(x)
        if self.centre is None:
            self.centre = rows[:: max(1, len(rows) // SAMPLES)].float().mean(dim=0)
            self.first = torch.zeros_like(self.centre, dtype=torch.float64)
            self.second = torch.zeros_like(self.first)
        assert self.first is not None
        assert self.second is not None
        if triton := _triton(x.device.type):
            first, second = triton.sums(rows, self.centre)
            self.first += first
            self.second += second
        else:
            step = _piece(rows)
            ones = torch.ones(1, step, device=x.device)
            for start in range(0, len(rows), step):
                apart = rows[start : start + step].to(torch.float32, copy=True).sub_(self.centre)
                # sums of rows are products with ones: much faster
                self.first += (ones[:, : len(apart)] @ apart)[0]
                self.second += (ones[:, : len(apart)] @ apart.square_())[0]
        self.count += len(rows)

    def mean(self) -> Tensor:
        """Return the mean of each channel (C,), in float64."""
        assert self.centre is not None
        assert self.first is not None
        return self.centre.double() + self.first / self.count

    def statistics(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Return the mean of each group and the inverse of its deviation (groups,), in float64."""
        assert self.first is not None
        assert self.second is not None
        apart = self.first / self.count
        means = self.mean().reshape(groups, -1)
        within = (self.second / self.count - apart.square()).reshape(groups, -1).mean(dim=1)
        centre = means.mean(dim=1)
        return centre, (within.clamp(min=0) + (means - centre[:, None]).square().mean(dim=1) + eps).rsqrt()

    def affine(self, norm: nn.GroupNorm, *, silu: bool) -> Affine:
        """Return what `norm` does to a volume of these moments (Wu and He 2018)."""
        centre, deviation = self.statistics(norm.num_groups, norm.eps)
        scale = deviation.repeat_interleave(norm.num_channels // norm.num_groups) * norm.weight.double()
        shift = norm.bias.double() - centre.repeat_interleave(norm.num_channels // norm.num_groups) * scale
        return Affine(scale=scale.float(), shift=shift.float(), silu=silu)


class GroupNorm(nn.GroupNorm):
    """MONAI's group norm, and the SiLU behind it where `silu` says so, for inference on one volume or several."""

    silu = False

    @classmethod
    def of(cls, norm: nn.GroupNorm, *, silu: bool) -> GroupNorm:
        """Return a norm that holds the parameters of `norm` themselves."""
        made = cls(norm.num_groups, norm.num_channels, eps=norm.eps, device="meta")
        made.weight, made.bias, made.silu = norm.weight, norm.bias, silu
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised volumes (B, C, X, Y, Z), or (B, C, N) as tokens, in the dtype of `x`."""
        if x.dim() != 5 or torch.is_grad_enabled():
            y = functional.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
            return functional.silu(y) if self.silu else y
        made = torch.empty_like(x, memory_format=LAYOUT)
        for one, target in zip(x.split(1), made.split(1), strict=True):
            moments = Moments()
            moments.add(one)
            moments.affine(self, silu=self.silu).into(one, target)
        return made


def convolution(
    x: Tensor, conv: Any, *, padding: tuple[int, ...] | None = None, shift: Tensor | None = None, beside: Sequence[Tensor] = ()
) -> Tensor:
    """Return the convolution of volumes (B, C, X, Y, Z), to each channel of which `shift` (C,) is added, and to all of it `beside`.

    `padding` is used in place of the layer's own. The parts of `beside` follow each other along x.
    """
    bias = conv.bias if shift is None else shift if conv.bias is None else conv.bias + shift
    how = {"stride": conv.stride, "padding": conv.padding if padding is None else padding, "dilation": conv.dilation, "groups": conv.groups}
    triton = _triton(x.device.type)
    if triton is None or bias is None or len(x) != 1:
        made = functional.conv3d(x, conv.weight, bias, **how)
        start = 0
        for part in beside:
            made[:, :, start : start + part.shape[2]] += part
            start += part.shape[2]
        return made
    made = functional.conv3d(x, conv.weight, None, **how).contiguous(memory_format=LAYOUT)  # cuDNN adds a bias in a pass of its own
    triton.finish(rows_of(made), bias, rows_of(joined(beside)) if beside else None)
    return made


class Conv3d(nn.Conv3d):
    """A convolution for inference, whose bias costs no pass that can be saved."""

    @classmethod
    def of(cls, conv: nn.Conv3d) -> Conv3d:
        """Return one that holds the parameters of `conv` themselves."""
        made = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,  # type: ignore[arg-type]
                   bias=conv.bias is not None, device="meta")  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return what `torch.nn.Conv3d` returns."""
        return convolution(x, self)


def doubled(x: Tensor) -> Tensor:
    """Return planes (1, C, P + 2, Y, Z) at twice their resolution (1, C, 2 P, 2 Y, 2 Z), trilinear and clamped at the borders.

    The first and the last plane lie around those that are doubled.
    """
    planes = 2 * (x.shape[2] - 2)
    if triton := _triton(x.device.type):
        shape = (*x.shape[:2], planes, 2 * x.shape[3], 2 * x.shape[4])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)
        triton.doubled(x.contiguous(memory_format=LAYOUT), out)
        return out
    deep = torch.empty((*x.shape[:2], planes, *x.shape[3:]), dtype=x.dtype, device=x.device, memory_format=LAYOUT)
    torch.lerp(x[:, :, :-2], x[:, :, 1:-1], 0.75, out=deep[:, :, 0::2])
    torch.lerp(x[:, :, 1:-1], x[:, :, 2:], 0.25, out=deep[:, :, 1::2])
    return functional.interpolate(deep, scale_factor=(1, 2, 2), mode="trilinear")


def repeated(x: Tensor) -> Tensor:
    """Return volumes (B, C, X, Y, Z) at twice their resolution, each voxel eight times (nearest neighbour)."""
    triton = _triton(x.device.type)
    if triton is None or len(x) != 1:
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    out = torch.empty((*x.shape[:2], *(2 * n for n in x.shape[2:])), dtype=x.dtype, device=x.device, memory_format=LAYOUT)
    triton.repeated(x.contiguous(memory_format=LAYOUT), out)
    return out


def _piece(rows: Tensor) -> int:
    return max(1, PIECE // rows.shape[1]) if rows.device.type == "cpu" else len(rows)


class _Nothing:
    """What stands for the kernels on the device `meta`, where memory is counted and nothing is computed."""

    @staticmethod
    def sums(rows: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.empty_like(centre, dtype=torch.float64),) * 2

    normalise = finish = doubled = repeated = staticmethod(lambda *_, **__: None)


@cache
def _triton(device: str) -> Any:
    """Return the Triton kernels for a kind of device, or None where there are none."""
    if device == "meta":
        return _Nothing
    if device != "cuda":
        return None
    try:
        from . import triton_kernels
    except ImportError:  # torch for Windows comes without Triton
        return None
    return triton_kernels
