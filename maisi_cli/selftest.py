"""Whether this device computes what it should: convolutions and attention of the networks' shapes, against float64.

There were builds whose bfloat16 3D convolutions were silently wrong for large shapes (cuDNN 9.10.2), so nothing is taken on trust.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .kernels import LAYOUT

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""The largest relative error (root mean square) that rounding explains; float32 with TF32 products."""
SHAPES = {
    "cpu": (((1, 32, 4, 24, 24), 32), ((1, 64, 3, 40, 40), 64), ((1, 4, 8, 16, 16), 64)),
    "cuda": (((1, 64, 10, 256, 256), 64), ((1, 128, 6, 256, 256), 64), ((2, 64, 96, 128, 128), 128), ((1, 1, 66, 512, 512), 64)),
}
"""Inputs (B, C, X, Y, Z) and output channels of the convolutions that are tried on a kind of device."""
_SAMPLED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One operation in one precision: its relative error, and the most that is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the device computed what it should."""
        return self.error <= self.allowed


def check(device: torch.device) -> list[Found]:
    """Try 3x3x3 convolutions in both layouts, and attention, in every precision; each against sampled sums in float64."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for dtype, allowed in TOLERANCE.items():
        if device.type == "cpu" and dtype == torch.float16:
            continue  # never used there
        name = str(dtype).removeprefix("torch.")
        for layout, word in ((torch.contiguous_format, "planes"), (LAYOUT, "channels last")):
            errors = [_convolution(shape, channels, dtype, layout, device, rng) for shape, channels in SHAPES[device.type]]
            found.append(Found(name=f"convolutions, {name}, {word}", error=max(errors), allowed=allowed))
        found.append(Found(name=f"attention, {name}", error=_attention(dtype, device, rng), allowed=allowed))
    return found


def _convolution(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device, rng: torch.Generator
) -> float:
    x = torch.randn(shape, generator=rng).to(dtype)
    weight = (torch.randn(channels, shape[1], 3, 3, 3, generator=rng) / (27 * shape[1]) ** 0.5).to(dtype)
    with torch.inference_mode():
        made = functional.conv3d(x.to(device, memory_format=layout), weight.to(device, memory_format=layout), padding=1).cpu().float()
    return _relative(*_sampled(x, weight, made, rng))


def _sampled(x: Tensor, weight: Tensor, made: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what was made at random places, corners among them, and the sums there in float64."""
    padded = functional.pad(x, (1, 1, 1, 1, 1, 1))
    places = [torch.randint(0, n, (_SAMPLED // made.shape[1] + 2,), generator=rng) for n in (made.shape[0], *made.shape[2:])]
    for place, n in zip(places, (made.shape[0], *made.shape[2:]), strict=True):
        place[0], place[1] = 0, n - 1
    exact, ours = [], []
    for b, i, j, k in zip(*(place.tolist() for place in places), strict=True):
        around = padded[b, :, i : i + 3, j : j + 3, k : k + 3].double()
        exact.append((weight.double() * around).sum((1, 2, 3, 4)))
        ours.append(made[b, :, i, j, k].double())
    return torch.stack(ours), torch.stack(exact)


def _attention(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> float:
    query, key, value = (torch.randn(1, 4, 512, 32, generator=rng).to(dtype) for _ in range(3))
    with torch.inference_mode():
        made = functional.scaled_dot_product_attention(query.to(device), key.to(device), value.to(device)).cpu()
    exact = torch.softmax(query.double() @ key.double().transpose(-1, -2) / 32**0.5, -1) @ value.double()
    return _relative(made.double(), exact)


def _relative(made: Tensor, exact: Tensor) -> float:
    error = float((made - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return error if error == error else float("inf")
