"""What this device can do, measured: convolutions, attention and copies, as `gpu-plan --measure` keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch.nn import functional

from .devices import Gpu
from .estimates import Rates, rates_path
from .files import write_atomic
from .kernels import LAYOUT
from .networks import Precision

SECONDS = 4.0
"""How long each of the five measurements runs at most."""
CONVOLUTIONS = {"cuda": ((64, 8, 512), (128, 8, 256), (256, 8, 256)), "cpu": ((64, 4, 128), (128, 4, 96), (256, 4, 48))}
"""Channels, planes and side of the slabs that are convolved, as the decoder has them on a kind of device."""
TOKENS = {"cuda": 16384, "cpu": 4096}


def measure(gpu: Gpu, dtype: str, *, seconds: float = SECONDS) -> Rates:
    """Measure a device for about five times `seconds`: rates are those of the best run."""
    device = torch.device("cuda" if gpu.kind == "cuda" else "cpu")
    kind, held = device.type, Precision.named(dtype, device).dtype
    layout = torch.contiguous_format if held == torch.float32 and kind == "cpu" else LAYOUT
    rates = []
    with torch.inference_mode():
        for channels, planes, side in CONVOLUTIONS[kind]:
            x = torch.randn(1, channels, planes + 2, side, side, device=device, dtype=held).contiguous(memory_format=layout)
            weight = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=held).contiguous(memory_format=layout)
            work = 2 * 27 * channels**2 * planes * side**2
            convolve = partial(functional.conv3d, x, weight, padding=(0, 1, 1))
            rates.append(work / _best(convolve, device, seconds) / 1e12)
        query = torch.randn(1, 8, TOKENS[kind], 32, device=device, dtype=held)
        attention = _best(lambda: functional.scaled_dot_product_attention(query, query, query), device, seconds)
        values = torch.empty(2**28 if kind == "cuda" else 2**25, device=device, dtype=held)
        copy = _best(values.clone, device, seconds)
    return Rates(
        device=gpu.name,
        dtype=dtype,
        convolution=sum(rates) / len(rates),
        attention=4 * 8 * 32 * TOKENS[kind] ** 2 / attention / 1e12,
        copy=2 * values.numel() * values.element_size() / copy / 1e9,
    )


def keep(rates: Rates) -> None:
    """Write rates to the user's cache, in place of earlier ones of the device and precision."""
    path = rates_path()
    try:
        rows = json.loads(path.read_text("utf-8"))["rates"]
    except (OSError, ValueError, KeyError):
        rows = []
    rows = [row for row in rows if (row["device"], row["dtype"]) != (rates.device, rates.dtype)]
    write_atomic(path, json.dumps({"schema": "maisi.rates/1", "rates": [*rows, asdict(rates)]}, indent=2).encode())


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of the fastest of several runs."""
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    for _ in range(100):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > until:
            break
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
