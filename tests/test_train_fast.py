"""Fast training: the numbers and gradients of MONAI's modules, less kept for the way back, and the same names everywhere."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from maisi_cli.catalog import NetworkSpec
from maisi_cli.catalog import model as find_model
from maisi_cli.fast_training import Conv3d, Halved, norm_silu, pays, trainable
from maisi_cli.networks import binarise, build
from maisi_cli.testing import filled, tiny_model
from maisi_cli.train.recompute import recompute
from torch import Tensor, nn
from torch.nn import functional

CL = torch.channels_last_3d


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NetworkSpec]:
    """Tiny networks with every kind of block: attention on a level, in the middle and in the autoencoder, shortcuts, odd sizes."""
    found = dict(find_model(str(tiny_model(tmp_path_factory.mktemp("fast")))).networks)
    changes = {
        "vae": {"num_splits": 1, "num_channels": [8, 16, 16], "norm_num_groups": 4, "attention_levels": [False, False, True],
                "with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True},
        "unet": {"num_channels": [8, 16, 16], "attention_levels": [False, True, True], "num_head_channels": [0, 8, 8]},
        "controlnet": {"num_channels": [8, 16, 16], "attention_levels": [False, True, True], "num_head_channels": [0, 8, 8]},
    }  # fmt: skip
    return {name: dataclasses.replace(found[name], arguments={**found[name].arguments, **more}) for name, more in changes.items()}


def monai(specs: dict[str, NetworkSpec], *names: str, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """MONAI's networks as they come, with weights everywhere."""
    torch.manual_seed(3)
    return [filled(build(specs[name], fast=False), std=0.2).to(dtype) for name in names]


def vae_loss(vae: Any) -> Tensor:
    """Reconstruction and KL of a volume whose sizes are not all even below, with the same noise each time."""
    torch.manual_seed(5)
    image = torch.randn(2, 1, 16, 24, 16, dtype=next(vae.parameters()).dtype)
    made, mean, sigma = vae(image)
    return (made.float() - image).square().mean() + (mean.float().square() + sigma.float().square()).mean()


def unet_loss(unet: Any, controlnet: Any = None) -> Tensor:
    """The loss of a batch of two, steered by a mask where there is a ControlNet."""
    torch.manual_seed(5)
    latent = torch.randn(2, 4, 8, 12, 8, dtype=next(unet.parameters()).dtype)
    given: dict[str, Any] = {"x": latent, "timesteps": torch.tensor([100.0, 700.0]), "class_labels": torch.tensor([1, 2])}
    more: dict[str, Any] = {}
    if controlnet is not None:
        bits = binarise(torch.randint(0, 133, (2, 1, 32, 48, 32), dtype=torch.uint8), dtype=latent.dtype)
        more["down_block_additional_residuals"], more["mid_block_additional_residual"] = controlnet(**given, controlnet_cond=bits)
    spacing = torch.tensor([[100.0, 100.0, 200.0]], dtype=latent.dtype).expand(2, 3)
    return (unet(**given, **more, spacing_tensor=spacing).float() - latent).square().mean()


def gradients(loss: Any, *nets: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """The loss, and all gradients by name."""
    for net in nets:
        net.zero_grad(set_to_none=True)
    value = loss(*nets)
    value.backward()
    named = {f"{k}.{name}": weights.grad for k, net in enumerate(nets) for name, weights in net.named_parameters()}
    return float(value.detach()), {name: gradient.clone() for name, gradient in named.items() if gradient is not None}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor's gradient, to the largest of its values, or to a thousandth of the largest of all."""
    assert one.keys() == other.keys()
    least = max(float(gradient.abs().max()) for gradient in one.values()) / 1000
    return max(float((one[name] - other[name]).abs().max()) / max(float(one[name].abs().max()), least) for name in one)


def steered(unet: Any, controlnet: Any) -> Tensor:
    return unet_loss(unet, controlnet)


CASES = {"vae": (vae_loss, ("vae",)), "unet": (unet_loss, ("unet",)), "controlnet": (steered, ("unet", "controlnet"))}


def pair(specs: dict[str, NetworkSpec], case: str) -> tuple[Any, list[nn.Module], list[nn.Module]]:
    """A loss, MONAI's networks, and fast ones of the same weights; with a ControlNet the diffusion model is frozen."""
    loss, names = CASES[case]
    theirs = monai(specs, *names)
    if case == "controlnet":
        theirs[0].requires_grad_(False)
    return loss, theirs, [trainable(copy.deepcopy(network)) for network in theirs]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_monai(specs: dict[str, NetworkSpec], case: str) -> None:
    loss, theirs, ours = pair(specs, case)
    expected, wanted = gradients(loss, *theirs)
    value, found = gradients(loss, *ours)
    assert value == pytest.approx(expected, rel=1e-5)
    assert apart(wanted, found) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_recomputed_gradients_are_the_same(specs: dict[str, NetworkSpec], case: str) -> None:
    loss, _, ours = pair(specs, case)
    value, wanted = gradients(loss, *ours)
    for network in ours:
        assert recompute(network) > 0
    again, found = gradients(loss, *ours)
    assert again == value
    assert apart(wanted, found) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_under_autocast_gradients_are_as_close_to_exact_ones_as_monai_s(specs: dict[str, NetworkSpec], case: str) -> None:
    loss, theirs, ours = pair(specs, case)

    def half(*networks: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*networks)

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        both = [torch.cat([each[name].flatten() for name in one]) for each in (one, other)]
        return float((both[0] - both[1]).norm() / both[0].norm())

    _, exact = gradients(loss, *theirs)
    _, rounded = gradients(half, *theirs)
    _, found = gradients(half, *ours)
    assert 0 < distance(exact, found) < 1.5 * distance(exact, rounded)


@pytest.mark.parametrize("name", ["vae", "unet", "controlnet"])
def test_parameters_names_and_layouts_stay(specs: dict[str, NetworkSpec], name: str) -> None:
    (network,) = monai(specs, name)
    before = {key: (id(value), value.stride()) for key, value in network.named_parameters()}
    keys, modules, kinds = list(network.state_dict()), dict(network.named_modules()), {k: type(m) for k, m in network.named_modules()}
    assert trainable(network) is network
    assert {key: (id(value), value.stride()) for key, value in network.named_parameters()} == before
    assert list(network.state_dict()) == keys
    for key, module in network.named_modules():
        if any(True for _ in module.parameters()):
            assert module is modules[key]
            assert isinstance(module, nn.GroupNorm if "GroupNorm" in kinds[key].__name__ else kinds[key])
    assert any(isinstance(module, Conv3d) for module in network.modules())
    trainable(network)  # a second time there is nothing left to do
    assert list(network.state_dict()) == keys


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.sampled_from([(2, 1), (4, 2), (3, 3)]), st.tuples(*[st.integers(1, 3)] * 3), st.booleans(), st.booleans())
def test_the_fused_function_s_gradient_is_that_of_finite_differences(
    batch: int, channels: tuple[int, int], size: tuple[int, int, int], silu: bool, last: bool
) -> None:
    count, groups = channels
    assume(count // groups * math.prod(size) > 1)  # torch's own norm refuses a group of one value
    torch.manual_seed(1)
    x = torch.randn(batch, count, *size, dtype=torch.float64) * 2 + 1
    x = x.contiguous(memory_format=CL if last else torch.contiguous_format).requires_grad_()
    weight, bias = (torch.randn(count, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *each: norm_silu(*each, groups, 1e-2, silu=silu), (x, weight, bias))
    wanted = functional.group_norm(x, groups, weight, bias, 1e-2)
    torch.testing.assert_close(norm_silu(x, weight, bias, groups, 1e-2, silu=silu), functional.silu(wanted) if silu else wanted)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_norm_of_many_pieces_is_exact_far_from_zero(offset: float) -> None:
    """Sums around zero in float32 would lose the deviation beside an offset; 40^3 rows of 8 channels are several pieces."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 40, 40, 40) + offset).contiguous(memory_format=CL)
    weight, bias, slope = torch.randn(8), torch.randn(8), torch.randn(x.shape)
    found = []
    for make, dtype in ((norm_silu, torch.float32), (None, torch.float64)):
        given = [each.to(dtype).clone().requires_grad_() for each in (x, weight, bias)]
        y = make(*given, 2, 1e-6) if make else functional.silu(functional.group_norm(given[0], 2, given[1], given[2], 1e-6))
        y.backward(slope.to(dtype))
        found.append([y.detach(), *(each.grad for each in given)])
    for ours, exact in zip(*found, strict=True):
        assert float((ours - exact).abs().max() / exact.abs().max()) < 1e-4


def test_the_norm_keeps_its_input_and_statistics_alone() -> None:
    x = torch.randn(2, 16, 8, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=CL).requires_grad_()
    weight, bias = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = norm_silu(x, weight, bias, 4, 1e-6)
    assert y.dtype == torch.bfloat16
    assert [tensor.numel() for tensor in kept if tensor.numel() > 16] == [x.numel()]
    assert kept[0].data_ptr() == x.data_ptr()


def test_halving_leaves_odd_ends_out_as_pooling_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(Halved(2)(x), functional.avg_pool3d(x, 2))
    assert torch.autograd.gradcheck(Halved(2), (x,))


def test_compiled_it_is_the_same(specs: dict[str, NetworkSpec]) -> None:
    loss, _, ours = pair(specs, "vae")
    expected, wanted = gradients(loss, *ours)
    value, found = gradients(lambda vae: loss(torch.compile(vae, backend="aot_eager")), *ours)
    assert value == pytest.approx(expected, rel=1e-4)
    assert apart(wanted, found) < 1e-3


def test_it_is_used_where_it_pays() -> None:
    spec = find_model("nano-ct")
    vae, unet = (build(spec.networks[part]) for part in ("vae", "unet"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pays(vae, cpu)
    assert not pays(unet, cpu)
    assert pays(unet, cuda)
