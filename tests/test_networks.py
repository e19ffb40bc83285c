"""Networks against the reference's forward passes and key tables; what `fast` changes, guidance and conditions."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli import kernels, streaming
from maisi_cli.catalog import NetworkSpec, extractors, model
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.masks import denoising
from maisi_cli.networks import Condition, Networks, Precision, binarise, build, device_named
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiGroupNorm3D
from torch import Tensor, nn

from .golden import CPU, FP32, Golden, Shared, case, close, networks, spec

# the model's part, and the table of the reference's network of the same shape
TABLES = [
    ("rflow-ct", "real_rflow", ("vae", "unet", "controlnet", "mask_vae", "mask_unet")),
    ("ddpm-ct", "real_ddpm", ("vae", "unet", "controlnet", "mask_vae", "mask_unet")),
    ("rflow-mr", "real_rflow", ("vae", "unet", "controlnet")),
    ("rflow-mr-brain", "real_rflow", ("vae", "unet")),
]
TABLE_OF = {"vae": "autoencoder_def", "unet": "diffusion_unet_def", "controlnet": "controlnet_def",
            "mask_vae": "mask_generation_autoencoder_def", "mask_unet": "mask_generation_diffusion_def"}  # fmt: skip


@pytest.fixture
def u04(shared: Shared) -> Golden:
    return case(shared, "u04_networks")


# --- the reference's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tables", "parts"), TABLES)
def test_full_size_networks_have_the_keys_and_shapes_of_the_released_ones(
    shared: Shared, name: str, tables: str, parts: tuple[str, ...]
) -> None:
    totals = case(shared, "u70_state_dict_tables").meta["scalars"]["totals"]
    assert tuple(model(name).networks) == parts
    for part in parts:
        table = f"{tables}_{TABLE_OF[part]}"
        wanted = json.loads(shared(f"golden/u70_state_dict_tables/{table}.json").read_text("utf-8"))
        with torch.device("meta"):
            network = build(model(name).networks[part])
        made = {key: list(value.shape) for key, value in network.state_dict().items()}
        assert list(made.items()) == list(wanted.items()), part
        assert sum(parameter.numel() for parameter in network.parameters()) == totals[table]["parameters"]


def test_every_model_that_is_not_our_own_is_held_against_a_table() -> None:
    described = {path.name for path in (files("maisi_cli") / "data" / "models").iterdir() if path.name.endswith(".toml")}
    features = {f"{spec.name}.toml" for spec in extractors()}  # test_features.py looks at these
    assert described - features - {"nano-ct.toml", "nano-mask.toml"} == {f"{name}.toml" for name, _, _ in TABLES}


def test_nano_mask_is_nano_ct_with_mask_networks() -> None:
    nano, mask = model("nano-ct"), model("nano-mask")
    assert {part: mask.networks[part] for part in nano.networks} == nano.networks
    assert set(mask.networks) - set(nano.networks) == {"mask_vae", "mask_unet"}
    assert [mask.weight_path(weight) for weight in mask.weights] == [nano.weight_path(weight) for weight in nano.weights]
    assert (mask.limits, mask.scheduler, mask.defaults, mask.lesions) == (nano.limits, nano.scheduler, nano.defaults, nano.lesions)


@pytest.mark.parametrize("family", ["rflow", "ddpm"])
def test_predictions_are_the_reference_s(shared: Shared, u04: Golden, family: str) -> None:
    """The diffusion model alone, and steered by the ControlNet, at three times."""
    nets = networks(shared, family, "unet", "controlnet")
    latent = u04.tensor("latent")
    alone = Condition(spacing_mm=(1.5, 1.5, 2.0), modality=1, top_region=1, bottom_region=2)
    steered = Condition(spacing_mm=(1.5, 1.5, 2.0), modality=1, top_region=1, bottom_region=2, labels=u04.tensor("cond_labels"))
    times = {name.split("_t")[1] for name in u04.arrays if name.startswith(f"{family}_dm_t")}
    assert len(times) == 3
    for condition, kind in ((alone, "dm"), (steered, "dm_cn")):
        denoise = nets.denoiser(condition)
        for t in times:
            assert close(denoise(latent, torch.tensor(float(t))), u04.tensor(f"{family}_{kind}_t{t}"))


@pytest.mark.parametrize(("family", "t"), [("rflow", "512.5"), ("ddpm", "512")])
def test_residuals_of_the_controlnet_are_the_reference_s(shared: Shared, u04: Golden, family: str, t: str) -> None:
    controlnet = networks(shared, family, "unet", "controlnet").parts["controlnet"]
    names = {"class_labels": torch.tensor([1])} if family == "rflow" else {}
    with torch.inference_mode():
        down, middle = controlnet(x=u04.tensor("latent"), timesteps=torch.tensor([float(t)]),
                                  controlnet_cond=binarise(u04.tensor("cond_labels")), **names)  # fmt: skip
    assert close(middle, u04.tensor(f"{family}_cn_t{t}_mid"))
    assert sum(name.startswith(f"{family}_cn_t{t}_down") for name in u04.arrays) == len(down)
    for i, made in enumerate(down):
        assert close(made, u04.tensor(f"{family}_cn_t{t}_down{i}"))


@pytest.mark.parametrize("family", ["rflow", "ddpm"])
def test_each_sample_of_a_batch_has_its_own_condition(shared: Shared, u04: Golden, family: str) -> None:
    unet = networks(shared, family, "unet").parts["unet"]
    given = {"spacing_tensor": torch.tensor([[150.0, 150, 200], [80, 80, 500]])}
    if family == "rflow":
        given["class_labels"] = torch.tensor([9, 0])
    else:
        given["top_region_index_tensor"] = torch.eye(4)[[0, 1]] * 100
        given["bottom_region_index_tensor"] = torch.eye(4)[[3, 2]] * 100
    with torch.inference_mode():
        made = unet(x=u04.tensor("latent_b2"), timesteps=torch.tensor([700.0, 20.0]), **given)
    assert close(made, u04.tensor(f"{family}_dm_batch2"))


def test_mask_networks_are_the_reference_s(shared: Shared, u04: Golden) -> None:
    parts = networks(shared, "rflow", "unet", "mask_vae", "mask_unet").parts
    with torch.inference_mode():
        made = parts["mask_unet"](x=u04.tensor("latent"), timesteps=torch.tensor([500]), context=u04.tensor("anatomy_size"))
        logits = parts["mask_vae"].decode_stage_2_outputs(u04.tensor("latent"))  # type: ignore[operator]
    assert close(made, u04.tensor("mask_dm_t500"))
    assert close(logits[:, :, 28:36, 28:36, 28:36], u04.tensor("mask_ae_logits_8cube"))
    sure = u04.tensor("mask_ae_argmax_margin_f16") > 1e-3
    assert float(sure.float().mean()) > 0.99
    assert torch.equal(logits.argmax(1)[0].to(torch.uint8)[sure], u04.tensor("mask_ae_argmax")[sure])


@pytest.mark.parametrize(("precision", "near"), [("bf16", 0.05), ("fp16", 0.01)])
def test_mask_networks_run_in_every_precision(shared: Shared, u04: Golden, precision: str, near: float) -> None:
    """Their attention asks for float32 (`upcast_attention`), which fused attention adds up in by itself."""
    nets = networks(shared, "rflow", "unet", "mask_unet", precision=Precision.named(precision, CPU))
    sizes = u04.tensor("anatomy_size").reshape(-1).tolist()
    exact = denoising.denoiser(networks(shared, "rflow", "unet", "mask_unet"), sizes)(u04.tensor("latent"), T)
    made = denoising.denoiser(nets, sizes)(u04.tensor("latent"), T)
    assert float((made - exact).norm() / exact.norm()) < near


# --- what `fast` replaces ----------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(groups=st.sampled_from([1, 2, 4]), batch=st.integers(1, 2), offset=st.floats(-3, 3))
def test_native_group_norm_is_monai_s_with_the_same_weights(groups: int, batch: int, offset: float) -> None:
    drawn = torch.Generator().manual_seed(groups)
    loop = MaisiGroupNorm3D(groups, 8, eps=1e-3)
    native = nn.GroupNorm(groups, 8, eps=1e-3)
    for parameter in loop.parameters():
        nn.init.normal_(parameter, generator=drawn)
    native.load_state_dict(loop.state_dict())
    x = torch.randn(batch, 8, 4, 3, 5, generator=drawn) * 0.7 + offset
    with torch.inference_mode():
        assert torch.allclose(loop(x), native(x), atol=2e-5)


def test_fast_replaces_every_group_norm_and_split_and_keeps_their_weights(shared: Shared, u04: Golden) -> None:
    fast, plain = (networks(shared, "rflow", "unet", "vae", fast=fast).parts["vae"] for fast in (True, False))
    kinds = [[type(part) for part in vae.modules() if isinstance(part, nn.GroupNorm)] for vae in (fast, plain)]
    assert set(kinds[0]) == {kernels.GroupNorm}
    assert set(kinds[1]) == {MaisiGroupNorm3D}
    assert len(kinds[0]) == len(kinds[1])
    eps = [[part.eps for part in vae.modules() if isinstance(part, nn.GroupNorm)] for vae in (fast, plain)]
    assert eps[0] == eps[1]
    one, two = fast.state_dict(), plain.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    latent = u04.tensor("latent")[:, :, :6, :12, :6]
    with torch.inference_mode():
        made, wanted = (vae.decode_stage_2_outputs(latent) for vae in (fast, plain))  # type: ignore[operator]
    assert torch.allclose(made, wanted, atol=5e-5)


def attention(**values: Any) -> NetworkSpec:
    arguments = {"spatial_dims": 3, "in_channels": 4, "out_channels": 4, "num_channels": (8, 16), "attention_levels": (False, True),
                 "num_head_channels": (0, 8), "num_res_blocks": 1, "norm_num_groups": 4, "include_fc": True,
                 "include_top_region_index_input": False, "include_bottom_region_index_input": False, **values}  # fmt: skip
    return NetworkSpec(name="unet", kind="unet_maisi", arguments=arguments)


def test_attention_of_the_released_configurations_runs_on_a_cpu() -> None:
    """MONAI refuses `use_flash_attention` without CUDA; ours takes it, and fused attention is the explicit one."""
    explicit, flash, fast = build(attention(), fast=False), build(attention(use_flash_attention=True), fast=False), build(attention())

    def fused(network: nn.Module) -> set[Any]:
        return {part.use_flash_attention for part in network.modules() if hasattr(part, "use_flash_attention")}

    assert [fused(network) for network in (explicit, flash, fast)] == [{False}, {True}, {True}]
    x = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for parameter in explicit.parameters():  # nothing hides behind a convolution of zeros
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = explicit.eval()(x=x, timesteps=torch.tensor([300.0]))
        for network in (flash, fast):
            network.load_state_dict(explicit.state_dict())
            assert torch.allclose(network.eval()(x=x, timesteps=torch.tensor([300.0])), wanted, rtol=1e-4, atol=1e-5 * float(wanted.std()))
    assert float(wanted.std()) > 0


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (NetworkSpec(name="unet", kind="gan", arguments={}), "no network kind 'gan'"),
        (attention(colour="red"), "the network unet cannot be built: .*colour"),
        (attention(num_channels=(6, 16)), "the network unet cannot be built"),
    ],
)
def test_networks_that_cannot_be_built_say_why(described: NetworkSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(described)


# --- conditions ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(1, 8))
def test_binarised_labels_are_numpy_s_bits(seed: int, channels: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 2**channels, (2, 1, 3, 4, 5)).astype(np.uint8)
    wanted = np.moveaxis(np.unpackbits(labels[:, 0, ..., None], axis=-1, bitorder="little", count=channels), -1, 1)
    made = binarise(torch.from_numpy(labels), channels=channels)
    assert made.dtype == torch.float32
    assert np.array_equal(made.numpy(), wanted)
    assert np.array_equal(binarise(torch.from_numpy(labels.astype(np.int64)), channels=channels, dtype=torch.float16).numpy(), wanted)


class Recorder(nn.Module):
    """Stands for a diffusion model: remembers what it is called with; its prediction is the class, or what the ControlNet adds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, **inputs: Tensor) -> Tensor:
        self.calls.append(inputs)
        made = torch.full_like(inputs["x"], float(inputs["class_labels"][0])) if "class_labels" in inputs else inputs["x"] * 0
        return made + inputs.get("mid_block_additional_residual", torch.zeros(1))


class Residual(nn.Module):
    """Stands for a ControlNet: its residual is the mean of the embedded condition."""

    def __init__(self) -> None:
        super().__init__()
        self.controlnet_cond_embedding = Mean()

    def forward(self, controlnet_cond: Tensor, **_: Tensor) -> tuple[list[Tensor], Tensor]:
        return [], self.controlnet_cond_embedding(controlnet_cond)  # type: ignore[no-any-return]


class Mean(nn.Module):
    """Embeds a condition as its mean, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, condition: Tensor) -> Tensor:
        self.calls += 1
        return condition.float().mean().reshape(1, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _stand_ins_are_embedded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = streaming.embedded

    def embedded(embedding: Any, labels: Tensor, bits: Any, *, dtype: torch.dtype) -> Tensor:
        made = embedding(bits(labels, dtype=dtype)) if isinstance(embedding, Mean) else real(embedding, labels, bits, dtype=dtype)
        return torch.as_tensor(made)

    monkeypatch.setattr(streaming, "embedded", embedded)


def stand_in(name: str = "rflow-ct") -> tuple[Networks, Recorder, Residual]:
    unet, controlnet = Recorder(), Residual()
    parts: dict[str, nn.Module] = {"unet": unet, "controlnet": controlnet}
    return Networks(spec=model(name), parts=parts, scale_factor=1.0, device=CPU, precision=FP32), unet, controlnet


X, T = torch.zeros(1, 4, 2, 2, 2), torch.tensor(500.0)
SPACING = (1.0, 1.1, 1.3)
# bits of the labels: 255 has all eight, 1 has one
TUMOR, NONE = torch.full((1, 1, 8, 8, 8), 255, dtype=torch.uint8), torch.ones(1, 1, 8, 8, 8, dtype=torch.uint8)


@settings(deadline=None)
@given(st.floats(0.01, 20).filter(lambda scale: scale != 1))
def test_guidance_goes_from_the_unconditional_towards_the_conditional_prediction(scale: float) -> None:
    """u + s (c - u): the stand-in predicts its class, 9 with the modality and 0 without."""
    nets, unet, _ = stand_in()
    made = nets.denoiser(Condition(spacing_mm=SPACING, modality=9, cfg_modality=scale))(X, T)
    assert torch.allclose(made, torch.tensor(9 * scale))
    assert [int(call["class_labels"][0]) for call in unet.calls] == [9, 0]


@pytest.mark.parametrize(("compat", "without"), [(False, 9 + 1 / 8), (True, 0 + 1 / 8)])
def test_guidance_by_a_tumour_takes_it_out_of_the_mask(compat: bool, without: float) -> None:
    """The reference drops the modality as well."""
    nets, _, _ = stand_in()
    condition = Condition(spacing_mm=SPACING, modality=9, labels=TUMOR, labels_without_tumor=NONE, cfg_tumor=3.0, compat=compat)
    assert torch.allclose(nets.denoiser(condition)(X, T), torch.tensor(without + 3 * (9 + 1 - without)))


def test_guidance_by_the_mask_compares_with_no_mask_at_all() -> None:
    nets, unet, controlnet = stand_in()
    made = nets.denoiser(Condition(spacing_mm=SPACING, modality=9, labels=TUMOR, cfg_mask=3.0))(X, T)
    assert torch.allclose(made, torch.tensor(9 + 3 * (9 + 1 - 9.0)))
    assert len(unet.calls) == 2
    assert controlnet.controlnet_cond_embedding.calls == 1


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_guidance_scale_of_0_or_1_costs_no_second_branch(scale: float) -> None:
    for values in ({"cfg_modality": scale}, {"cfg_tumor": scale}, {"cfg_mask": scale}):
        nets, unet, controlnet = stand_in()
        made = nets.denoiser(Condition(spacing_mm=SPACING, modality=9, labels=TUMOR, **values))(X, T)
        assert torch.allclose(made, torch.tensor(10.0))
        assert len(unet.calls) == 1
        assert controlnet.controlnet_cond_embedding.calls == 1


def test_conditions_are_embedded_once_for_all_steps() -> None:
    nets, unet, controlnet = stand_in()
    guided = Condition(spacing_mm=SPACING, labels=TUMOR, labels_without_tumor=NONE, cfg_tumor=2.0)
    for condition, embedded in ((Condition(spacing_mm=SPACING, labels=TUMOR), 1), (guided, 2)):
        embedding = controlnet.controlnet_cond_embedding
        embedding.calls, unet.calls = 0, []
        denoise = nets.denoiser(condition)
        for t in (1000.0, 600.0, 200.0):
            denoise(X, torch.tensor(t))
        assert embedding.calls == embedded
        assert len(unet.calls) == 3 * embedded
        assert controlnet.controlnet_cond_embedding is embedding


@pytest.mark.parametrize(("precision", "near"), [("fp32", 2e-5), ("bf16", 0.05)])
def test_what_is_embedded_once_gives_what_the_whole_networks_of_monai_give(
    shared: Shared, u04: Golden, precision: str, near: float
) -> None:
    nets = networks(shared, "rflow", "unet", "controlnet", precision=Precision.named(precision, CPU))
    plain = networks(shared, "rflow", "unet", "controlnet", fast=False)
    labels, x = u04.tensor("cond_labels"), u04.tensor("latent")
    made = nets.denoiser(Condition(spacing_mm=(1.5, 1.5, 2.0), labels=labels))(x, T)
    names = {"class_labels": torch.tensor([1])}
    with torch.inference_mode():
        down, middle = plain.parts["controlnet"](x=x, timesteps=T.reshape(1), controlnet_cond=binarise(labels), **names)
        wanted = plain.parts["unet"](x=x, timesteps=T.reshape(1), spacing_tensor=torch.tensor([[150.0, 150.0, 200.0]]), **names,
                                     down_block_additional_residuals=down, mid_block_additional_residual=middle)  # fmt: skip
    assert made.dtype == torch.float32
    assert float((made - wanted).norm() / wanted.norm()) < near


def test_embeddings_that_stay_the_same_are_computed_once_and_bit_for_bit(shared: Shared, u04: Golden) -> None:
    """With the same modules: what is hoisted out of the loop changes no bit."""
    nets = networks(shared, "rflow", "unet")
    unet, x = nets.parts["unet"], u04.tensor("latent")
    calls: list[str] = []
    for name in ("spacing_layer", "class_embedding"):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    denoise = nets.denoiser(Condition(spacing_mm=(1.5, 1.5, 2.0)))
    first, _ = denoise(x, T), denoise(x, T / 2)
    assert calls == ["spacing_layer", "class_embedding"]
    with torch.inference_mode():
        wanted = unet(x=x.contiguous(memory_format=torch.channels_last_3d), timesteps=T.reshape(1),
                      spacing_tensor=torch.tensor([[150.0, 150.0, 200.0]]), class_labels=torch.tensor([1]))  # fmt: skip
    assert torch.equal(first, wanted)


def test_one_condition_serves_a_batch(shared: Shared, u04: Golden) -> None:
    for family in ("rflow", "ddpm"):
        nets = networks(shared, family, "unet", "controlnet")
        x = u04.tensor("latent_b2")
        labels = u04.tensor("cond_labels")[..., :32]
        denoise = nets.denoiser(Condition(spacing_mm=(1.5, 1.5, 2.0), top_region=0, bottom_region=3, labels=labels))
        both = denoise(x, T)
        assert torch.allclose(both, torch.cat([denoise(one[None], T) for one in x]), atol=1e-4 * float(both.std()))


def test_networks_are_told_spacing_regions_and_class() -> None:
    nets, unet, _ = stand_in("ddpm-ct")
    nets.denoiser(Condition(spacing_mm=SPACING, modality=9, top_region=1, bottom_region=3))(X, T)
    (call,) = unet.calls
    assert set(call) == {"x", "timesteps", "spacing_tensor", "top_region_index_tensor", "bottom_region_index_tensor"}
    assert call["timesteps"].tolist() == [500.0]
    assert call["spacing_tensor"].tolist()[0] == pytest.approx([100, 110, 130])
    assert call["top_region_index_tensor"].tolist() == [[0, 100, 0, 0]]
    assert call["bottom_region_index_tensor"].tolist() == [[0, 0, 0, 100]]
    nets, unet, _ = stand_in()
    nets.denoiser(Condition(spacing_mm=SPACING, modality=9))(X, T)
    assert set(unet.calls[0]) == {"x", "timesteps", "spacing_tensor", "class_labels"}
    assert unet.calls[0]["class_labels"].tolist() == [9]


def test_compat_rounds_the_spacing_to_float16_as_the_image_only_path_of_the_reference_does() -> None:
    for compat, wanted in ((False, 66.667), (True, 66.6875)):
        nets, unet, _ = stand_in()
        nets.denoiser(Condition(spacing_mm=(0.66667, 1.5, 2.0), compat=compat))(X, T)
        assert unet.calls[0]["spacing_tensor"].tolist()[0] == pytest.approx([wanted, 150, 200], abs=1e-4)
        assert unet.calls[0]["spacing_tensor"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rflow-ct", {"cfg_modality": -1.0}, "cfg_modality is -1"),
        ("rflow-ct", {"cfg_tumor": -0.5}, "cfg_tumor is -0.5"),
        ("rflow-ct", {"cfg_modality": 2.0, "cfg_tumor": 2.0}, "both on"),
        ("rflow-ct", {"cfg_modality": 2.0, "cfg_mask": 2.0}, "both on"),
        ("rflow-ct", {"cfg_tumor": 2.0, "labels": TUMOR}, "needs the mask without its tumour"),
        ("ddpm-ct", {}, "needs a body region"),
        ("ddpm-ct", {"top_region": 1}, "needs a body region"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stand_in(name)[0].denoiser(Condition(spacing_mm=SPACING, **values))


def test_labels_need_a_controlnet() -> None:
    nets, _, _ = stand_in()
    del nets.parts["controlnet"]
    with pytest.raises(UsageError, match="has no ControlNet"):
        nets.denoiser(Condition(spacing_mm=SPACING, labels=TUMOR))


# --- precision and device -------------------------------------------------------------------------------


def test_precision_is_what_its_name_says(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Precision.named("auto", torch.device("cuda")).dtype == torch.float16
    for suits, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        monkeypatch.setattr("maisi_cli.networks.default_dtype", lambda _kind, suits=suits: suits)
        assert Precision.named("auto", CPU) == Precision(name=suits, dtype=dtype)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        unet = networks(shared, "rflow", "unet", precision=Precision.named(name, CPU)).parts["unet"]
        held = {type(part).__name__: weight.dtype for part in unet.modules() for weight in part.parameters(recurse=False)}
        assert (held["Conv3d"], held["GroupNorm"], held["Embedding"]) == (dtype, torch.float32, torch.float32)
    with pytest.raises(UsageError, match="no precision 'fp8'"):
        Precision.named("fp8", CPU)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_named("auto") == device_named("cpu") == CPU
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(CannotRun, match=r"no (CUDA|MPS) device"):
            device_named(name)
    with pytest.raises(UsageError, match="no device 'gpu'"):
        device_named("gpu")


def test_the_specification_is_left_as_it_is(shared: Shared) -> None:
    described: dict[str, Any] = {part: dict(network.arguments) for part, network in spec(shared, "rflow").networks.items()}
    for part, network in spec(shared, "rflow").networks.items():
        build(network)
        assert dict(network.arguments) == described[part]
