"""Traces: counted bytes and operations by closed form, and the table of estimates against fresh traces."""

from __future__ import annotations

import pytest
import torch
from maisi_cli import estimates, tracing
from maisi_cli.catalog import model
from torch import nn
from torch.nn import functional

META = torch.device("meta")


def test_live_bytes_rise_and_fall_with_tensors() -> None:
    with tracing.Trace() as trace:
        a = torch.empty(1024, 256, device=META)
        b = a * 2
        assert trace.live == 2 * 2**20
        del a
        assert trace.live == 2**20
        c = b.add_(1)
        assert trace.live == 2**20
        del b, c
    assert (trace.live, trace.peak) == (0, 2 * 2**20)


def test_operations_of_convolutions_and_attention_are_counted() -> None:
    conv = nn.Conv3d(8, 16, 3, padding=1, device=META)
    with torch.inference_mode(), tracing.Trace() as trace:
        conv(torch.empty(1, 8, 4, 5, 6, device=META))
    assert trace.flops == 2 * 27 * 8 * 16 * 4 * 5 * 6
    query = torch.empty(1, 2, 10, 32, device=META)
    with torch.inference_mode(), tracing.Trace() as trace:
        functional.scaled_dot_product_attention(query, query, query)
    assert trace.attention_flops == trace.flops == 2 * 2 * 2 * 10 * 10 * 32


def test_workspaces_count_at_the_peak_alone() -> None:
    conv = nn.Conv3d(1, 1, 1, bias=False, device=META)
    with torch.inference_mode(), tracing.Trace(tracing.transformed) as trace:
        conv(torch.empty(1, 1, 64, 64, 64, device=META))
    volume = 4 * 64**3
    assert trace.peak == 4 * volume + tracing.BLOCK  # input, output, both in another layout, and the weight
    assert trace.live < 2 * volume


def test_autocast_s_table_is_applied() -> None:
    conv = nn.Conv3d(1, 1, 1, device=META)
    x = torch.empty(1, 1, 4, 4, 4, device=META)
    with torch.inference_mode(), tracing.Autocast():
        half = conv(x)
        assert half.dtype == torch.float16
        assert functional.interpolate(half, scale_factor=2, mode="trilinear").dtype == torch.float32
    assert conv(x).dtype == torch.float32


@pytest.mark.parametrize("mode", estimates.SWEEPS)
@pytest.mark.parametrize(("name", "size"), [("nano-ct", (128, 96, 64)), ("rflow-ct", (256, 256, 256)), ("rflow-ct", (384, 384, 256))])
def test_the_table_s_decoder_is_a_fresh_trace_s(name: str, size: tuple[int, int, int], mode: str) -> None:
    """At sizes that it was not fitted to as well."""
    spec = model(name)
    traced = tracing.decode(spec, size, torch.bfloat16, device="cuda", mode=mode)
    told = estimates.decode(spec, size, itemsize=2, device="cuda", mode=mode)
    assert told is not None
    assert told.peak_gib == pytest.approx(traced.peak_gib, rel=0.12)
    assert told.tflop == pytest.approx(traced.tflop, rel=0.05)


@pytest.mark.parametrize(("name", "size"), [("nano-ct", (128, 96, 64)), ("rflow-ct", (256, 256, 128)), ("ddpm-ct", (384, 384, 256))])
def test_the_table_s_steps_are_fresh_traces(name: str, size: tuple[int, int, int]) -> None:
    spec = model(name)
    latent = [n // 4 for n in size]
    traced = tracing.denoise_step(spec, latent, torch.bfloat16, paired=True)
    told = estimates.denoise_step(spec, size, itemsize=2, paired=True)
    assert told is not None
    assert told.peak_gib == pytest.approx(traced.peak_gib, rel=0.02)
    assert told.tflop == pytest.approx(traced.tflop, rel=0.02)
    trained = tracing.train_step(spec, "dm", latent)
    told = estimates.train_step(spec, "dm", size)
    assert told is not None
    assert told.peak_gib - estimates.TRAINING_GIB == pytest.approx(trained.peak_gib, rel=0.05)


def test_recomputing_saves_memory_and_costs_operations() -> None:
    spec = model("rflow-ct")
    plain, less = (tracing.train_step(spec, "dm", (32, 32, 32), checkpointing=each) for each in (False, True))
    assert less.peak_gib < plain.peak_gib
    assert less.tflop > plain.tflop
