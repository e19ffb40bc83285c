"""Decoding: windows and splits against the reference's numbers, and a decoder of closed form through every path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli import phantom
from maisi_cli.catalog import model
from maisi_cli.decoding import check_splits, decode, decode_image, decode_window, reference_decoder, to_hu
from maisi_cli.errors import Rejected, UsageError
from maisi_cli.events import Step
from maisi_cli.geometry import Geometry
from maisi_cli.networks import Networks, build, load
from maisi_cli.quality.seams import profile
from maisi_cli.weights import locate
from torch import Tensor, nn

from .golden import CPU, FP32, Golden, Shared, case, close, networks, spec, worst

WINDOWS = [("roi12x12x12_ov0.4", 0.4), ("roi8x8x8_ov0.6666", 0.6666), ("roi8x8x8_ov0.25", 0.25), ("roi16x16x16_ov0.6666", 0.6666),
           ("roi24x8x8_ov0.4", 0.4)]  # fmt: skip


# --- sliding window -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "overlap"), WINDOWS)
def test_windows_are_the_reference_s(shared: Shared, name: str, overlap: float) -> None:
    """A window with as many voxels as the latent decodes it whole, whatever its sides; else Gaussian windows are blended."""
    u06 = case(shared, "u06_sliding_window")
    latent, window = u06.tensor("latent"), [int(n) for n in name.split("_")[0][3:].split("x")]
    way = reference_decoder(latent.shape[2:], window)
    steps: list[Step] = []
    nets = networks(shared, "rflow", "unet", "vae")
    made = decode(nets, latent, decoder=way, window=window, overlap=overlap, on_event=steps.append)  # type: ignore[arg-type]
    assert close(made, u06.tensor(name))
    wanted = u06.meta["scalars"][name]
    assert way == ("exact" if wanted["windows"] == 1 else "window")
    done = [(step.done, step.total) for step in steps]
    assert done == [(i + 1, len(done)) for i in range(len(done))]
    assert way == "exact" or len(done) == wanted["windows"]
    deviation = float((made - u06.tensor("direct")).abs().max())
    assert deviation == pytest.approx(wanted["max_abs_vs_direct"], abs=1e-4)


def stretched(part: Tensor) -> Tensor:
    """A decoder that is linear and looks at one latent voxel at a time: it cannot tell a window from the whole."""
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25]).reshape(1, 4, 1, 1, 1)
    return nn.functional.interpolate((part * weights).sum(1, keepdim=True), scale_factor=4, mode="nearest")


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(*[st.integers(3, 12)] * 3), window=st.tuples(*[st.integers(2, 14)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.4, 0.6666, 0.9, 0.99]),
)  # fmt: skip
def test_windows_of_a_linear_decoder_blend_to_the_whole(size: tuple[int, ...], window: tuple[int, ...], overlap: float) -> None:
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    steps: list[Step] = []
    shapes: list[tuple[int, ...]] = []

    def call(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape[2:]))
        return stretched(part)

    if max(overlap, 0.9) == overlap:  # hundreds of windows
        window = tuple(max(w, n - 1) for w, n in zip(window, size, strict=True))
    made = decode_window(call, latent, window, overlap, on_event=steps.append)  # type: ignore[arg-type]
    assert torch.allclose(made, stretched(latent), atol=1e-5)
    assert set(shapes) == {tuple(min(w, n) for w, n in zip(window, size, strict=True))}
    assert [step.done for step in steps] == list(range(1, len(shapes) + 1))
    assert {step.total for step in steps} == {len(shapes)}


# --- splits ---------------------------------------------------------------------------------------


def whole(found: Any) -> bool:
    """Say whether the reference's result with splits is that without: it neither raised nor lost rows."""
    return isinstance(found, dict) and found["max_abs_vs_1"] != "shape differs"


def rows_and_splits(name: str) -> tuple[int, int]:
    """Read `latent 8x12x8 splits 4` or `image 32x48x32 splits 4`: rows of the latent, and splits."""
    kind, size, _, splits = name.split()
    return int(size.split("x")[1]) // (1 if kind == "latent" else 4), int(splits)


def test_splits_are_refused_where_the_reference_drops_rows_or_crashes(shared: Shared) -> None:
    scalars = case(shared, "u05_num_splits").meta["scalars"]
    refused = 0
    for name, found in {**scalars["decode"], **scalars["encode"]}.items():
        rows, splits = rows_and_splits(name)
        if whole(found):
            check_splits(rows, splits)
        else:
            refused += 1
            with pytest.raises(UsageError, match=f"{splits} splits do not divide a latent of {rows} rows"):
                check_splits(rows, splits)
    assert refused > 20


@pytest.mark.parametrize("name", ["8x12x8 splits 4", "8x14x8 splits 4", "8x8x8 splits 4"])
def test_splits_of_monai_s_convolutions_do_what_the_reference_saw(shared: Shared, name: str) -> None:
    found = case(shared, "u05_num_splits").meta["scalars"]["decode"][f"latent {name}"]
    described = spec(shared, "rflow").networks["vae"]
    splits = int(name.split()[-1])
    plain, slabs = (build(dataclasses.replace(described, arguments={**described.arguments, "num_splits": n}), fast=fast).eval()
                    for n, fast in ((1, True), (splits, False)))  # fmt: skip
    slabs.load_state_dict(plain.state_dict())
    latent = torch.randn(1, 4, *map(int, name.split()[0].split("x")), generator=torch.Generator().manual_seed(0))

    def run(network: Any) -> Tensor:
        with torch.inference_mode():
            return network.decode_stage_2_outputs(latent)  # type: ignore[no-any-return]

    if isinstance(found, str):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            run(slabs)
        return
    made = run(slabs)
    assert list(made.shape[2:]) == found["out_shape"]
    if whole(found):
        assert torch.allclose(made, run(plain), atol=5e-5)


@settings(deadline=None)
@given(rows=st.integers(1, 256), splits=st.integers(1, 20))
def test_splits_that_are_named_are_valid(rows: int, splits: int) -> None:
    try:
        check_splits(rows, splits)
        assert rows % splits == 0
        assert splits == 1 or rows // splits >= 3
    except UsageError as error:
        for allowed in str(error.hint).removeprefix("use --splits ").split(", "):
            check_splits(rows, int(allowed))


# --- decoding ---------------------------------------------------------------------------------------


class Stretch(nn.Module):
    """The linear decoder above as a VAE."""

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        return stretched(z)


NETS = Networks(spec=model("rflow-ct"), parts={"vae": Stretch()}, scale_factor=1.25, device=CPU, precision=FP32)


def test_the_latent_is_divided_by_the_scale_factor_before_windows_are_decoded() -> None:
    latent = torch.randn(1, 4, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = stretched(latent) / 1.25
    assert torch.allclose(decode(NETS, latent, decoder="window", window=(4, 4, 4), overlap=0.5), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder": "fast"}, "no decoder 'fast'"),
        ({"decoder": "window"}, "needs a window"),
        ({"decoder": "window", "window": (4, 0, 4)}, "needs a window"),
        ({"decoder": "window", "window": (4, 4, 4), "overlap": 1.0}, "overlap is 1"),
        ({"decoder": "window", "window": (4, 4, 4), "overlap": -0.1}, "overlap is -0.1"),
    ],
)
def test_what_cannot_be_decoded_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode(NETS, torch.zeros(1, 4, 6, 6, 6), **values)


@pytest.mark.parametrize(
    ("modality", "wanted"),
    [("ct", [-1000, -1000, -500, 0, 1000, 1000]), ("mri-t1", [0, 0, 250, 500, 1000, 1500])],
)
def test_intensities_become_hu_or_mr_units(modality: str, wanted: list[float]) -> None:
    made = to_hu(torch.tensor([-0.2, 0.0, 0.25, 0.5, 1.0, 1.5]).reshape(1, 1, 1, 2, 3), modality)
    assert made.shape == (1, 2, 3)
    assert made.dtype == np.float32
    assert made.flatten().tolist() == wanted


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_hu_are_computed_in_single_precision(step: float) -> None:
    """Half precision knows 3027 values of HU, up to 1 apart and off by almost as much; ours tells tenths apart (number 38)."""
    hu = torch.arange(-1000, 1000, step, dtype=torch.float64)
    made = to_hu(((hu + 1000) / 2000).float().reshape(1, 1, -1, 1, 1), "ct").ravel()
    assert np.abs(made - hu.numpy()).max() < 2e-4
    assert len(np.unique(made)) == len(hu)


class Half(nn.Module):
    """A decoder that answers in half precision, as one under autocast does: the same value everywhere."""

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        return torch.full((1, 1, *(4 * n for n in z.shape[2:])), 0.7, dtype=torch.float16)


def test_windows_are_blended_in_single_precision() -> None:
    """Where every window says the same the blend does, to rounding; blended in half as in the reference it does not (number 39)."""
    latent, how = torch.zeros(1, 4, 9, 7, 8), {"window": (4, 4, 4), "overlap": 0.6666}
    nets = Networks(spec=model("rflow-ct"), parts={"vae": Half()}, scale_factor=1.0, device=CPU, precision=FP32)
    value = float(torch.tensor(0.7, dtype=torch.float16))
    made = decode(nets, latent, decoder="window", **how)  # type: ignore[arg-type]
    assert made.dtype == torch.float32
    assert float((made - value).abs().max()) < 1e-6
    in_half = decode_window(Half().decode_stage_2_outputs, latent.half(), how["window"], how["overlap"])  # type: ignore[arg-type]
    assert float((in_half - value).abs().max()) > 1e-4


@pytest.mark.parametrize(
    "how", [{}, {"sweeps": "half"}, {"sweeps": "recompute"}, {"decoder": "window", "window": (4, 4, 4), "overlap": 0.5}]
)
@pytest.mark.parametrize("modality", ["ct", "mri-t1"])
def test_an_image_is_the_rounded_volume_whatever_it_is_made_of(shared: Shared, modality: str, how: dict[str, Any]) -> None:
    """Slabs are rescaled and rounded one by one; a file's numbers come out, the same as of the whole volume in float32."""
    nets = networks(shared, "rflow", "unet", "vae")
    latent = torch.randn(1, nets.spec.latent_channels, 9, 6, 7, generator=torch.Generator().manual_seed(3))
    made = decode_image(nets, latent, modality, **how)
    assert (made.dtype, made.shape) == (np.int16, (36, 24, 28))
    assert len(np.unique(made)) > 10
    assert np.array_equal(made, np.rint(to_hu(decode(nets, latent, **how), modality)))


@pytest.mark.parametrize("value", [40.0, float("inf"), float("nan")])
def test_an_image_holds_what_int16_can_and_nothing_that_is_no_number(value: float) -> None:
    latent = torch.zeros(1, 4, 5, 5, 5)
    latent[0, 3, 2, 2, 2] = value * 4 * 1.25  # the linear decoder takes a quarter of it
    if np.isfinite(value):
        assert decode_image(NETS, latent, "mri-t1", decoder="window", window=(4, 4, 4)).max() == 2**15 - 1
        return
    with pytest.raises(Rejected, match="not finite"):
        decode_image(NETS, latent, "ct", decoder="window", window=(4, 4, 4))


def test_slabs_leave_no_seam_in_a_body_where_windows_do() -> None:
    """What the seam check measures between planes is that of the whole volume, in every mode; windows step where they meet."""
    found = model("nano-ct")
    parts = ["vae", "unet"]  # whose file holds the scale of latents
    nets = load(found, parts, device=CPU, precision=FP32, files=locate(found, parts))
    body = phantom.body(Geometry(size=(96, 96, 64), spacing=(4.0, 4.0, 4.0)), 7)
    hu = phantom.render(body, 7).array
    latent = nets.encode(torch.from_numpy((np.asarray(hu, np.float32).clip(-1000, 1000) + 1000) / 2000)[None, None])
    with torch.inference_mode():
        whole = to_hu(nets.parts["vae"].decode_stage_2_outputs(latent / nets.scale_factor), "ct")  # type: ignore[operator]

    def apart(made: Any) -> float:
        """By how many HU the steps between planes differ from those of the whole volume, at most."""
        return max(float(np.nanmax(np.abs(profile(made, axis).step - profile(whole, axis).step))) for axis in range(3))

    for mode in ("store", "half", "recompute"):
        made = to_hu(decode(nets, latent, sweeps=mode), "ct")
        assert np.abs(made - whole).max() < 0.2  # 1e-4 of the range
        assert apart(made) < 0.1
    assert apart(to_hu(decode(nets, latent, decoder="window", window=(12, 12, 8), overlap=0.25), "ct")) > 5


@pytest.mark.parametrize("rows", [5, 14])
def test_no_row_is_lost_whatever_number_of_splits_a_model_file_names(shared: Shared, rows: int) -> None:
    """Four splits leave 2 of 5 and 12 of 14 rows in the reference (number 40); ours runs its convolutions whole."""
    for part in ("vae", "mask_vae"):
        described = spec(shared, "rflow").networks[part]
        network: Any = build(dataclasses.replace(described, arguments={**described.arguments, "num_splits": 4})).eval()
        with torch.inference_mode():
            assert network.decode_stage_2_outputs(torch.zeros(1, 4, 4, rows, 4)).shape[2:] == (16, 4 * rows, 16)
            channels = described.arguments["in_channels"]
            assert network.encode(torch.zeros(1, channels, 16, 4 * rows, 16))[0].shape[2:] == (4, rows, 4)


@pytest.fixture
def u04(shared: Shared) -> Golden:
    return case(shared, "u04_networks")


@pytest.mark.parametrize(("splits", "family"), [(1, "rflow"), (2, "ddpm"), (4, "rflow")])
def test_slabs_and_whole_convolutions_decode_and_encode_as_the_reference(shared: Shared, u04: Golden, splits: int, family: str) -> None:
    """One split is our network as it is used; two and four are MONAI's own modules. Both families share the autoencoder."""
    nets = networks(shared, family, "unet", "vae", fast=splits == 1)
    assert {part.num_splits for part in nets.parts["vae"].modules() if hasattr(part, "num_splits")} == {splits}
    call: Callable[..., Any] = nets.parts["vae"].decode_stage_2_outputs  # type: ignore[assignment]
    with torch.inference_mode():
        assert close(call(u04.tensor("latent")), u04.tensor(f"ae_decode_splits{splits}"))
        assert close(nets.parts["vae"].encode(u04.tensor("image"))[1], u04.tensor("ae_sigma"))  # type: ignore[operator]
    latent = nets.encode(u04.tensor("image"))
    assert close(latent / nets.scale_factor, u04.tensor("ae_mu"))
    if splits == 1:
        assert worst(decode(nets, latent), u04.tensor("ae_reconstruct")) < 1e-4
