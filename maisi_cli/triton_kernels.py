"""What `kernels` does, as Triton kernels for CUDA: each reads a volume once, and writes it at most once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 512
"""Rows whose sums one program takes in float32."""


@triton.jit
def _normalise(x, scale, shift, y, count, C: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    channel = (at % C).to(tl.int32)
    value = tl.load(x + at, mask=inside).to(tl.float32) * tl.load(scale + channel) + tl.load(shift + channel)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sums(x, centre, first, second, rows, C: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    middle = tl.load(centre + channel)[None, :]
    one = tl.zeros((BR, BC), tl.float32)
    two = tl.zeros((BR, BC), tl.float32)
    for start in range(0, ROWS, BR):
        row = program * ROWS + start + tl.arange(0, BR)
        inside = (row < rows)[:, None]
        value = tl.load(x + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, value - middle, 0.0)
        one += apart
        two += apart * apart
    tl.store(first + program * C + channel, tl.sum(one, axis=0))
    tl.store(second + program * C + channel, tl.sum(two, axis=0))


@triton.jit
def _finish(x, bias, beside, count, C: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(bias + (at % C).to(tl.int32)).to(tl.float32)
    if BESIDE:
        value += tl.load(beside + at, mask=inside).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _doubled(x, y, Y, Z, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    plane, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 2 * Z * C
    column, channel = at // C, at % C
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(2):  # an even place takes a quarter of what lies before it, an odd one three quarters
        p = (plane + 1) // 2 + a
        of_plane = tl.where(plane % 2 == a, 0.25, 0.75)
        for b in tl.static_range(2):
            r = tl.minimum(tl.maximum((row + 1) // 2 - 1 + b, 0), Y - 1)
            of_row = tl.where(row % 2 == b, 0.25, 0.75)
            for c in tl.static_range(2):
                z = tl.minimum(tl.maximum((column + 1) // 2 - 1 + c, 0), Z - 1)
                of_column = tl.where(column % 2 == c, 0.25, 0.75)
                value = tl.load(x + ((p * Y + r) * Z + z) * C + channel, mask=inside, other=0.0).to(tl.float32)
                total += of_plane * of_row * of_column * value
    tl.store(y + (plane * 2 * Y + row) * 2 * Z * C + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _repeated(x, y, Y, Z, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    plane, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 2 * Z * C
    value = tl.load(x + ((plane // 2 * Y + row // 2) * Z + at // C // 2) * C + at % C, mask=inside)
    tl.store(y + (plane * 2 * Y + row) * 2 * Z * C + at, value, mask=inside)


def normalise(rows: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, silu: bool) -> None:
    """Write rows (N, C) times scale plus shift, and SiLU of it where asked, to `out`; both are contiguous."""
    count = rows.numel()
    block = 2048
    with torch.cuda.device(rows.device):
        _normalise[(triton.cdiv(count, block),)](rows.contiguous(), scale, shift, out, count, C=rows.shape[1], SILU=silu, BLOCK=block)


def sums(rows: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums (C,) of rows minus the centre, and of the squares, in float64; C is a multiple of 32, or a power of two."""
    count, channels = rows.shape
    width = next(n for n in (64, 32, 16, 8, 4, 2, 1) if channels % n == 0)
    programs = triton.cdiv(count, _ROWS)
    first = torch.empty(programs, channels, device=rows.device)
    second = torch.empty_like(first)
    with torch.cuda.device(rows.device):
        _sums[(programs, channels // width)](
            rows.contiguous(), centre, first, second, count, C=channels, ROWS=_ROWS, BR=min(_ROWS, 4096 // width), BC=width
        )
    return first.sum(dim=0, dtype=torch.float64), second.sum(dim=0, dtype=torch.float64)


def finish(x: Tensor, bias: Tensor, beside: Tensor | None) -> None:
    """Add a bias (C,) and what lies beside to rows (N, C), in place."""
    block, count = 2048, x.numel()
    with torch.cuda.device(x.device):
        _finish[(triton.cdiv(count, block),)](
            x, bias, x if beside is None else beside.contiguous(), count, C=x.shape[1], BESIDE=beside is not None, BLOCK=block
        )


def doubled(x: Tensor, out: Tensor) -> None:
    """Write planes (1, C, P + 2, Y, Z) at twice their resolution to `out` (1, C, 2 P, 2 Y, 2 Z), both channels-last."""
    channels, _, y, z = x.shape[1:]
    block = 1024
    with torch.cuda.device(x.device):
        _doubled[(out.shape[2], 2 * y, triton.cdiv(2 * z * channels, block))](x, out, y, z, C=channels, BLOCK=block)


def repeated(x: Tensor, out: Tensor) -> None:
    """Write each voxel of (1, C, X, Y, Z) eight times to `out` (1, C, 2 X, 2 Y, 2 Z), both channels-last."""
    channels, _, y, z = x.shape[1:]
    block = 1024
    with torch.cuda.device(x.device):
        _repeated[(out.shape[2], 2 * y, triton.cdiv(2 * z * channels, block))](x, out, y, z, C=channels, BLOCK=block)
