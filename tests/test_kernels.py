"""Norms over rows of channels, and MONAI's modules laid out for inference: the numbers of torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli import inference, kernels
from maisi_cli.kernels import Moments
from torch import nn
from torch.nn import functional

usual = settings(max_examples=25, deadline=None)
CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
@usual
def test_moments_of_slabs_are_those_of_the_whole_and_normalise_as_torch_does(parts, seed):
    x = torch.randn(1, 6, sum(parts), 3, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    norm = nn.GroupNorm(2, 6, eps=1e-6)
    nn.init.normal_(norm.weight)
    moments = Moments()
    for part in x.split(parts, dim=2):
        moments.add(part)
    assert torch.allclose(moments.mean().float(), x.mean(dim=(0, 2, 3, 4)), rtol=1e-6)
    assert torch.allclose(moments.affine(norm, silu=False).apply(x), norm(x), atol=2e-3)
    assert torch.allclose(moments.affine(norm, silu=True).apply(x), nn.functional.silu(norm(x)), atol=2e-3)


@given(offset=st.floats(-3e4, 3e4), spread=st.floats(1e-2, 1e3), seed=st.integers(0, 99))
@usual
def test_moments_stay_exact_far_from_zero(offset: float, spread: float, seed: int) -> None:
    """Sums are taken around a centre: a large mean costs no digits beyond those that float32 values have."""
    x = torch.randn(1, 4, 5, 6, 7, generator=torch.Generator().manual_seed(seed)) * spread + offset
    moments = Moments()
    moments.add(x)
    exact = x.double()
    norm = nn.GroupNorm(4, 4, eps=0.0)
    assert torch.allclose(moments.mean(), exact.mean(dim=(0, 2, 3, 4)), rtol=1e-7, atol=1e-6 * spread)
    variance = exact.var(dim=(0, 2, 3, 4), correction=0)
    assert torch.allclose(moments.affine(norm, silu=False).scale.double() ** -2, variance, rtol=1e-4)


def test_what_is_larger_than_a_piece_is_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    norm = nn.GroupNorm(4, 8)
    monkeypatch.setattr(kernels, "PIECE", 8 * 11)  # 11 rows, which divide nothing here
    made = kernels.GroupNorm.of(norm, silu=False)
    with torch.inference_mode():
        assert torch.allclose(made(x), norm(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_norm_in_one_pass_is_torch_s(dtype: torch.dtype, silu: bool, last: bool) -> None:
    """A batch, both layouts: within the rounding of the dtype of what float32 gives."""
    drawn = torch.Generator().manual_seed(1)
    norm = nn.GroupNorm(3, 12)
    for weights in norm.parameters():
        nn.init.normal_(weights, generator=drawn)
    x = (torch.randn(2, 12, 4, 5, 6, generator=drawn) * 2 + 1).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        made = kernels.GroupNorm.of(norm, silu=silu)(x)
        wanted = norm(x.float())
        wanted = functional.silu(wanted) if silu else wanted
    assert made.dtype == dtype
    assert torch.allclose(made.float(), wanted, rtol=torch.finfo(dtype).eps * 1.01, atol=1e-5)


def test_a_norm_can_be_trained_through() -> None:
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(1, 4, 3, 3, 3, requires_grad=True)
    (one,) = torch.autograd.grad(kernels.GroupNorm.of(norm, silu=True)(x).square().sum(), x)
    (two,) = torch.autograd.grad(functional.silu(norm(x)).square().sum(), x)
    assert torch.allclose(one, two, atol=1e-5)


@given(size=st.tuples(*[st.integers(2, 7)] * 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@usual
def test_halving_is_the_mean_of_eight_voxels(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, *size).to(dtype)
    made = inference.HalfMean()(x)
    assert made.dtype == dtype
    assert torch.allclose(made.float(), functional.avg_pool3d(x.float(), 2), rtol=torch.finfo(dtype).eps, atol=1e-6)


def unet(**values: object) -> nn.Module:
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    made = DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=4, out_channels=4, num_channels=(16, 32), attention_levels=(False, True), num_head_channels=(0, 8),
        num_res_blocks=1, norm_num_groups=8, resblock_updown=True, include_spacing_input=True, num_class_embeds=3, **values,  # type: ignore[arg-type]
    )  # fmt: skip
    for number, weights in enumerate(made.parameters()):
        nn.init.normal_(weights, std=0.1, generator=torch.Generator().manual_seed(number))
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_network_that_is_laid_out_gives_what_it_gave(dtype: torch.dtype, near: float) -> None:
    plain = unet()
    fast = inference.laid_out(copy.deepcopy(plain), dtype, CPU)
    given = {"timesteps": torch.tensor([300.0]), "class_labels": torch.tensor([1])}
    x, spacing = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 1.0, 2.0]])
    assert list(fast.state_dict()) == list(plain.state_dict())
    with torch.inference_mode():
        wanted = plain(x=x, spacing_tensor=spacing, **given)
        for name in inference.EXACT:
            if hasattr(fast, name):
                fast.get_submodule(name).to(dtype)  # `Networks` computes these beforehand, in float32
        made = fast(x=x.to(dtype), spacing_tensor=spacing.to(dtype), **given)
    assert made.dtype == dtype
    assert float((made.float() - wanted).norm() / wanted.norm()) < near


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_with_times_of_its_own_is_served(batch: int) -> None:
    plain = unet()
    fast = inference.laid_out(copy.deepcopy(plain), torch.float32, CPU)
    drawn = torch.Generator().manual_seed(0)
    given = {"x": torch.randn(batch, 4, 8, 8, 8, generator=drawn), "timesteps": torch.tensor([300.0, 700.0])[:batch],
             "class_labels": torch.tensor([1, 2])[:batch], "spacing_tensor": torch.rand(batch, 3, generator=drawn)}  # fmt: skip
    with torch.inference_mode():
        assert torch.allclose(fast(**given), plain(**given), rtol=1e-4, atol=1e-5)


def test_a_convolution_adds_bias_shift_and_what_lies_beside() -> None:
    drawn = torch.Generator().manual_seed(0)
    conv, x = nn.Conv3d(3, 4, 3, padding=1), torch.randn(1, 3, 5, 6, 7, generator=drawn)
    shift, beside = torch.randn(4, generator=drawn), torch.randn(1, 4, 5, 6, 7, generator=drawn)
    with torch.inference_mode():
        wanted = conv(x) + shift[:, None, None, None] + beside
        assert torch.allclose(kernels.convolution(x, conv, shift=shift, beside=[beside[:, :, :2], beside[:, :, 2:]]), wanted, atol=1e-5)
        assert torch.equal(kernels.Conv3d.of(conv)(x), conv(x))


@given(size=st.tuples(*[st.integers(1, 6)] * 3), batch=st.integers(1, 2))
@usual
def test_doubling_is_torch_s_interpolation(size: tuple[int, int, int], batch: int) -> None:
    x = torch.randn(batch, 3, *size)
    assert torch.equal(kernels.repeated(x), functional.interpolate(x, scale_factor=2, mode="nearest"))
    bordered = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    assert torch.allclose(kernels.doubled(bordered), functional.interpolate(x, scale_factor=2, mode="trilinear"), atol=1e-6)
