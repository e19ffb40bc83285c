"""Whole runs of the reference with a mask: from the database, from the mask diffusion, and of the user's own."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from maisi_cli import streaming
from maisi_cli.anatomy import maisi, region_index
from maisi_cli.catalog import model
from maisi_cli.decoding import decode, reference_decoder, to_hu
from maisi_cli.errors import UsageError
from maisi_cli.events import Event, Note
from maisi_cli.geometry import Geometry
from maisi_cli.masks import database, denoising, fitting, own, renumbered, sizes
from maisi_cli.networks import Condition, Networks
from maisi_cli.repair import repair
from maisi_cli.sampling import euler, flow_schedule
from maisi_cli.settings import GenerateSettings
from maisi_cli.volumes import Mask, read_mask
from torch import Tensor

from .golden import CPU, FP32, Golden, Shared, case, networks, spec, worst

PAIRED = [
    ("p20_paired_rflow_db_exact", "controlnet_label_0", "image_0"),
    ("p23_paired_rflow_maskgen", "controlnet_label_0", "image_0"),
    ("p30_from_mask_rflow_64", "label", "image"),
]


def steps_of(golden: Golden, made: Sequence[Tensor], prefix: str = "step") -> list[float]:
    """Return the deviation of each latent that the case stores, in standard deviations."""
    stored = {i: f"{prefix}{i:02d}_sample" for i in range(len(made)) if f"{prefix}{i:02d}_sample" in golden.arrays}
    return [worst(made[i], golden.tensor(name)) for i, name in stored.items()]


@pytest.mark.parametrize(("name", "label", "image"), PAIRED)
def test_an_image_for_a_mask_is_the_reference_s(shared: Shared, name: str, label: str, image: str) -> None:
    golden = case(shared, name)
    noise, labels = golden.tensor("step00_input"), golden.tensor(label).to(torch.uint8)
    schedule = flow_schedule(5, noise.shape[2:], compat=True)
    assert schedule.times.tolist() == [step["t"] for step in golden.meta["scalars"]["steps"] if step["p"].startswith("step")]
    condition = Condition(spacing_mm=(1.5, 1.5, 2.0), modality=1, labels=labels[None, None], compat=True)
    nets = networks(shared, "rflow", "unet", "vae", "controlnet")
    made: list[Tensor] = []
    euler(nets.denoiser(condition), noise, schedule, on_step=lambda _done, _total, latent: made.append(latent))
    found = steps_of(golden, made)
    assert len(found) == 5
    assert max(found) < 1e-4
    assert worst(made[-1], golden.tensor("decode_input")) < 1e-4
    intensity = decode(nets, made[-1], decoder=reference_decoder(made[-1].shape[2:], (16, 16, 16)))
    assert worst(intensity, golden.tensor("decode_output")) < 1e-4
    hu = to_hu(intensity, "ct")
    hu[labels.numpy() == 0] = -1000
    assert float(np.abs(hu - golden.arrays[image]).max()) < 0.1


# --- masks of the diffusion -------------------------------------------------------------------------


def test_the_mask_diffusion_is_the_reference_s(shared: Shared) -> None:
    golden = case(shared, "p23_paired_rflow_maskgen")
    asked = sizes.parse([f"{name}={size}" for name, size in golden.meta["config"]["controllable_anatomy_size"]])
    vectors = sizes.read_vectors(shared("golden/datasets/all_anatomy_size_conditions.json"))
    vector = sizes.condition(vectors, asked, compat=True)
    assert list(vector) == golden.meta["scalars"]["anatomy_size_condition"]
    assert sizes.target_tumor(vector) == golden.meta["scalars"]["target_tumor_label"]
    nets = networks(shared, "rflow", "mask_vae", "mask_unet")
    draws = iter(golden.draws[1:])
    made: list[Tensor] = []
    denoising.sample(nets, vector, golden.tensor("mask_step00_input"), steps=5, generator=lambda _like: next(draws),
                     on_step=lambda _done, _total, latent: made.append(latent), compat=True)  # fmt: skip
    assert torch.equal(next(draws).half().float(), golden.tensor("step00_input"))  # what follows is the noise of the image
    assert max(steps_of(golden, made, "mask_step")) < 1e-4
    assert len(steps_of(golden, made, "mask_step")) == 5
    channels = denoising.decode(nets, golden.tensor("mask_decode_input"))
    wanted = golden.arrays["mask_decode_argmax"][0]
    assert float((channels != wanted).mean()) < 1e-4  # where two channels are equally likely, rounding decides
    labels = denoising.to_labels(wanted)
    assert np.array_equal(labels, golden.arrays["mask_before_postprocess"])
    assert np.array_equal(repair(labels, tumor=26, compat=True), golden.arrays["mask_after_postprocess"])


@pytest.mark.parametrize("slab", [1, 5, 8, 64])
def test_slabs_of_the_decoder_are_the_whole_and_no_more_is_held(shared: Shared, slab: int) -> None:
    nets = networks(shared, "rflow", "mask_vae", "mask_unet")
    latent = torch.randn(1, 4, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    found = denoising.decode(nets, latent, planes=slab)
    slabs = list(streaming.decoded(nets.parts["mask_vae"], latent / nets.scale_factor, planes=slab))
    assert sum(part.shape[2] for part in slabs) == 16
    assert max(part.shape[2] for part in slabs) <= max(slab + 1, 5)  # the last planes wait for the end of the volume
    with torch.inference_mode():
        whole = nets.parts["mask_vae"].decode_stage_2_outputs(latent / nets.scale_factor)[0]  # type: ignore[operator]
    top = whole.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4 * whole.std()).numpy()
    assert clear.mean() > 0.99
    assert np.array_equal(found[clear], whole.argmax(dim=0).numpy()[clear])


def test_a_generated_mask_is_put_on_the_volume_as_the_reference_does(shared: Shared) -> None:
    golden = case(shared, "p23_paired_rflow_maskgen")
    cube = Geometry(size=(64, 64, 64), spacing=(1.5, 1.5, 1.5))
    mask = Mask(array=golden.arrays["mask_after_postprocess"].astype(np.uint8), geometry=cube)
    made = fitting.fit(mask, Geometry(size=(64, 64, 64), spacing=(1.5, 1.5, 2.0)), compat=True)
    assert np.array_equal(made.array, golden.arrays["controlnet_label_0"])
    assert np.allclose(made.geometry.affine, golden.meta["scalars"]["saved_0"]["affine"])


# --- masks of the database --------------------------------------------------------------------------


def test_the_search_finds_the_mask_that_the_reference_finds(shared: Shared) -> None:
    golden = case(shared, "p20_paired_rflow_db_exact")
    config = golden.meta["config"]
    wanted = database.Wanted(organs=frozenset(maisi().id(name) for name in config["anatomy_list"]), regions=(1, 2), compat=True)
    entries = database.read_index(shared("golden/datasets/candidate_masks_small.json"), compat=True)
    geometry = Geometry(size=tuple(config["output_size"]), spacing=tuple(config["spacing"]))
    found = database.exact(database.suitable(entries, wanted), geometry, compat=True)
    assert [each.file for each in found] == golden.meta["scalars"]["selected_masks"]
    mask = read_mask(shared("golden/datasets/all_masks_small") / found[0].file)
    assert np.array_equal(mask.array, golden.arrays["mask_read_0"])
    assert fitting.fit(mask, geometry, compat=True).array is mask.array


def test_every_search_finds_the_masks_that_the_reference_finds(shared: Shared) -> None:
    found = case(shared, "u01_labels").meta["scalars"]["find_masks"]
    entries = database.read_index(shared("golden/datasets/candidate_masks_small.json"), compat=True)
    searches = {key: files for key, files in found.items() if "/" in key}
    assert len(searches) == 7
    for key, files in searches.items():
        regions, organs, grid = key.split("/")
        wanted = database.Wanted(
            organs=frozenset(ast.literal_eval(organs)), regions=tuple(map(region_index, regions.split("+"))), compat=True
        )
        made = database.suitable(entries, wanted)
        if grid.startswith("exact"):
            made = database.exact(made, Geometry(size=(64, 64, 64), spacing=(1.5, 1.5, 2.0)), compat=True)
        assert [each.file for each in made] == (files if isinstance(files, list) else []), key  # an error where the reference finds none
    with pytest.raises(UsageError, match="no body region 'neck'"):
        region_index("neck")


def test_labels_are_filtered_and_numbered_as_the_reference_does(shared: Shared) -> None:
    mask = read_mask(shared("golden/datasets/all_masks_small/m1.nii.gz"))
    names = tuple(maisi().name_of(label) for label in (23, 1, 28))
    made = renumbered(mask, GenerateSettings(anatomy=names))
    assert np.array_equal(made.array, case(shared, "u01_labels").arrays["filter_mask_23_1_28"])


@pytest.mark.parametrize("name", ["p20_paired_rflow_db_exact", "p23_paired_rflow_maskgen"])
def test_labels_are_numbered_as_the_reference_saves_them(shared: Shared, name: str) -> None:
    golden = case(shared, name)
    config = golden.meta["config"]
    settings = GenerateSettings(anatomy=tuple(config["anatomy_list"]),
                                anatomy_size=tuple(f"{organ}={size}" for organ, size in config["controllable_anatomy_size"]))  # fmt: skip
    cube = Geometry(size=(64, 64, 64), spacing=(1.5, 1.5, 2.0))
    made = renumbered(Mask(array=golden.arrays["controlnet_label_0"].astype(np.uint8), geometry=cube), settings)
    saved = read_mask(shared(f"golden/{name}/label_0.nii.gz"))
    assert np.array_equal(made.array, saved.array)


# --- masks of the user ------------------------------------------------------------------------------


def test_a_mask_of_the_user_s_is_resampled_as_the_reference_does(shared: Shared) -> None:
    golden = case(shared, "u30_validate_user_mask")
    mask = read_mask(shared("golden/datasets/user_mask_odd.nii.gz"))
    wanted = golden.meta["scalars"]["odd"]
    target = fitting.suggested(mask.geometry, model("rflow-ct"))
    assert target.size == tuple(wanted["shape"])
    assert np.allclose(target.spacing, wanted["spacing"], rtol=1e-6)
    made = fitting.fit(mask, target, compat=True)
    assert np.allclose(made.geometry.affine, wanted["affine"], atol=1e-4)
    slices = {"x128": made.array[128], "y128": made.array[:, 128], "z64": made.array[:, :, 64], "ds8": made.array[::8, ::8, ::8]}
    for name, values in slices.items():
        assert np.array_equal(values, golden.arrays[f"odd_label__{name}"]), name
    histogram = {float(label): int(count) for label, count in enumerate(made.counts()) if count}
    assert histogram == {float(label): count for label, count in golden.meta["scalars"]["odd_histogram"].items()}


def test_in_compatibility_a_mask_of_the_user_s_is_resampled_and_that_is_said(shared: Shared) -> None:
    said: list[Event] = []
    path = str(shared("golden/datasets/user_mask_odd.nii.gz"))
    mask = own(GenerateSettings(mask=path, compat="reference"), spec=model("rflow-ct"), on_event=said.append)
    assert mask.geometry.size == (256, 256, 128)
    assert any(isinstance(note, Note) and "resampled from 100x90x60" in note.text for note in said)
    assert own(GenerateSettings(mask=path), spec=model("rflow-ct")).geometry.size == (100, 90, 60)


def test_the_grid_for_a_mask_of_the_user_s_is_the_reference_s(shared: Shared) -> None:
    targets = case(shared, "u30_validate_user_mask").meta["scalars"]["targets"]
    assert len(targets) == 7
    for text, wanted in targets.items():
        size, spacing = ast.literal_eval(text)
        geometry = Geometry(size=size, spacing=spacing)
        found = fitting.suggested(geometry, model("rflow-ct"))
        assert (found == geometry) is wanted["valid"], text
        assert found.size == tuple(wanted["suggest"][0])
        assert np.allclose(found.spacing, wanted["suggest"][1])


# --- what the reference rounds ----------------------------------------------------------------------


@pytest.mark.parametrize(("half", "told"), [(True, 66.625), (False, 200 / 3)])
def test_the_spacing_of_a_mask_is_rounded_as_the_reference_does(shared: Shared, half: bool, told: float) -> None:
    """For masks of the user's and generated ones: to float16, then times 100 in float16 (reference.md 2.3)."""
    seen: list[Tensor] = []

    class Recorder(torch.nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, spacing_tensor: Tensor, **_: Tensor) -> Tensor:
            seen.append(spacing_tensor)
            return x

    nets = Networks(spec=spec(shared, "rflow"), parts={"unet": Recorder()}, scale_factor=1.0, device=CPU, precision=FP32)
    condition = Condition(spacing_mm=(2 / 3, 1.5, 2.0), compat_half_spacing=half)
    nets.denoiser(condition)(torch.zeros(1, 4, 4, 4, 4), torch.tensor(500.0))
    assert seen[0].tolist() == [pytest.approx([told, 150, 200], abs=0 if half else 1e-4)]
