"""Whole runs of the reference, from its noise to its image, and its label tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from maisi_cli.anatomy import regions_of, remap_table
from maisi_cli.decoding import decode, reference_decoder, to_hu
from maisi_cli.networks import Condition, Precision, binarise
from maisi_cli.sampling import FAMILIES, ddpm, euler, family_of
from maisi_cli.volumes import read_mask
from torch import Tensor

from .golden import CPU, FP32, Golden, Shared, case, networks, worst

REFERENCE_WINDOW = (80, 80, 80)


def sample(shared: Shared, golden: Golden, *, precision: Precision = FP32, steps: int | None = None) -> list[Tensor]:
    """Sample as the case says, from its noise and with its draws; return the latent after each of the first `steps`."""
    config, family = golden.meta["config"], golden.meta["network"]
    sampler = {"rflow": euler, "ddpm": ddpm}[family]
    noise, draws = golden.tensor("step00_input"), iter(golden.draws[1:])
    schedule = FAMILIES[family_of(sampler)](config["num_inference_steps"], noise.shape[2:], base_voxels=32**3, compat=True)
    assert schedule.times.tolist() == [step["t"] for step in golden.meta["scalars"]["steps"]]
    condition = Condition(
        spacing_mm=tuple(config["spacing"]), modality=config["modality"], top_region=config["top_region_index"].index(1),
        bottom_region=config["bottom_region_index"].index(1), cfg_modality=config["cfg_guidance_scale"], compat=True,
    )  # fmt: skip
    made: list[Tensor] = []

    def on_step(done: int, _total: int, latent: Tensor) -> None:
        made.append(latent)
        if done == steps:
            raise StopIteration

    denoise = networks(shared, family, "unet", precision=precision).denoiser(condition)
    try:
        sampler(denoise, noise, schedule, on_step=on_step, generator=lambda _like: next(draws))
    except StopIteration:
        return made
    assert not list(draws)  # as many draws as the reference made
    return made


def deviations(golden: Golden, made: Sequence[Tensor]) -> list[float]:
    """Return the deviation of each latent that the case stores, in standard deviations."""
    stored = {i: f"step{i:02d}_sample" for i in range(len(made)) if f"step{i:02d}_sample" in golden.arrays}
    return [worst(made[i], golden.tensor(name)) for i, name in stored.items()]


@pytest.mark.parametrize(
    ("name", "modality"),
    [("p10_image_only_rflow_64", "ct"), ("p11_image_only_ddpm_64", "ct"), ("p12_image_only_rflow_64_cfg_mr", "mri-t1")],
)
def test_an_image_is_the_reference_s(shared: Shared, name: str, modality: str) -> None:
    golden = case(shared, name)
    made = sample(shared, golden)
    assert len(made) == golden.meta["config"]["num_inference_steps"]
    found = deviations(golden, made)
    assert len(found) >= 6
    assert max(found) < 1e-4
    assert worst(made[-1], golden.tensor("decode_input")) < 1e-4
    nets = networks(shared, golden.meta["network"], "unet", "vae")
    intensity = decode(nets, made[-1], decoder=reference_decoder(made[-1].shape[2:], REFERENCE_WINDOW))
    assert worst(intensity, golden.tensor("decode_output")) < 1e-4
    image = to_hu(intensity, modality)
    assert float(np.abs(image - to_hu(golden.tensor("decode_output"), modality)).max()) < 0.1
    cut = np.trunc(image).astype(np.int16)  # the reference cuts fractions off
    assert int(np.abs(cut - golden.arrays["image_int16"]).max()) <= 1
    assert float((cut != golden.arrays["image_int16"]).mean()) < 0.01


def test_in_half_precision_the_image_is_the_reference_s_but_for_rounding(shared: Shared) -> None:
    """Autocast to float16 is emulated on most CPUs and slow: two steps and the reference's last latent stand for the whole."""
    golden = case(shared, "p10_image_only_rflow_64_fp16ac")
    half = Precision.named("fp16", CPU)
    assert max(deviations(golden, sample(shared, golden, precision=half, steps=2))) < 2e-3
    nets = networks(shared, "rflow", "unet", "vae")
    away = np.abs(to_hu(decode(nets, golden.tensor("decode_input")), "ct") - to_hu(golden.tensor("decode_output"), "ct"))
    assert float(away.max()) < 13
    assert 0.1 < float(away.mean()) < 1  # float16 was used where the reference ran, and nothing else differs
    corner = golden.tensor("decode_input")[..., :4, :4, :4]
    rounded = networks(shared, "rflow", "unet", "vae", precision=half)
    assert 1e-5 < worst(decode(rounded, corner), decode(nets, corner)) < 0.03


@pytest.mark.slow
def test_a_whole_run_in_half_precision_ends_within_its_rounding_of_the_reference_s_image(shared: Shared) -> None:
    golden = case(shared, "p10_image_only_rflow_64_fp16ac")
    half = Precision.named("fp16", CPU)
    made = sample(shared, golden, precision=half)
    assert len(made) == golden.meta["config"]["num_inference_steps"]
    assert max(deviations(golden, made)) < 3e-3
    nets = networks(shared, "rflow", "unet", "vae", precision=half)
    intensity = decode(nets, made[-1], decoder=reference_decoder(made[-1].shape[2:], REFERENCE_WINDOW))
    theirs = to_hu(golden.tensor("decode_output"), "ct")
    away = np.abs(to_hu(intensity, "ct") - theirs)
    rounding = np.abs(to_hu(decode(networks(shared, "rflow", "unet", "vae"), golden.tensor("decode_input")), "ct") - theirs)
    assert float(away.max()) < 13
    assert float(away.mean()) < 1.15 * float(rounding.mean()) < 1  # theirs is as far from what float32 makes of its own latent


# --- labels -----------------------------------------------------------------------------------------


def test_labels_are_mapped_and_binarised_as_the_reference_does(shared: Shared) -> None:
    """The mask autoencoder's channels to MAISI ids, and ids to bits."""
    u01 = case(shared, "u01_labels")
    table = np.array(remap_table("raw125").table())
    assert np.array_equal(table[u01.arrays["raw125"]], u01.arrays["remap_124_to_132"])
    bits = binarise(u01.tensor("lab132")[None, None], dtype=torch.uint8)
    assert torch.equal(bits, u01.tensor("binarize_8bit"))


def test_body_regions_of_masks_are_the_reference_s(shared: Shared) -> None:
    scalars: dict[str, Any] = case(shared, "u01_labels").meta["scalars"]
    names = [name.removeprefix("region_") for name in scalars if name.startswith("region_m")]
    assert len(names) == 4
    for name in names:
        ids = read_mask(shared(f"golden/datasets/all_masks_small/{name}.nii.gz")).ids()
        assert regions_of(ids) == tuple(one_hot.index(1) for one_hot in scalars[f"region_{name}"])


@pytest.mark.parametrize(("ids", "regions"), [({22}, (0, 0)), ({120, 29}, (0, 1)), ({1, 94}, (2, 3)), ({115}, None), ({62, 200}, None)])
def test_body_regions_without_a_marker_are_none(ids: set[int], regions: tuple[int, int] | None) -> None:
    """The reference raises an error of numpy where no organ marks a region."""
    assert regions_of(ids) == regions
