"""`train mask-vae` and `train mask-dm`: an anatomy generator of one's own, from label maps to `generate`."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maisi_cli import cli, generate
from maisi_cli.anatomy import maisi, remap_table
from maisi_cli.catalog import model as find_model
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.masks.denoising import denoiser, to_labels
from maisi_cli.masks.sizes import ABSENT, SLOTS, read_vectors
from maisi_cli.networks import Networks, Precision, binarise
from maisi_cli.testing import TINY
from maisi_cli.train import TrainSettings, bodies, mask_dm, mask_model, mask_vae, train
from maisi_cli.train.bodies import Body
from maisi_cli.train.data import make_phantoms, read_list
from maisi_cli.train.mask_dm import MaskDiffusionTask
from maisi_cli.train.mask_vae import MaskVaeTask, dice_of
from maisi_cli.volumes import Mask, Sample, read_mask, write_mask
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .fakehub import _MASK_NETWORKS
from .killing import killed_anywhere

LIVER = SLOTS.index("liver")
WEIGHTS = """
[mask_scheduler]
name = "ddpm"
latent_size = [8, 8, 8]

[[weights]]
part = "mask_vae"
path = "mask_vae.safetensors"

[[weights]]
part = "mask_unet"
path = "mask_unet.safetensors"

[[weights]]
part = "data"
path = "all_anatomy_size_conditions.json"
layout = "data"
"""


def with_mask_networks() -> str:
    """Return the model file of the tiny networks, and of mask networks with the channels of all labels."""
    head, _, tail = TINY.partition("[[weights]]")
    networks = _MASK_NETWORKS.replace("out_channels = 5", "out_channels = 125")
    return f"{head}{networks}\n[[weights]]{tail}{WEIGHTS}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks")
    make_phantoms(path / "data", 3, size=32, workers=1)
    (path / "model").mkdir()
    (path / "model" / "tiny.toml").write_text(with_mask_networks())
    return path


def settings_of(folder: Path, kind: str = "mask-vae", **changes: Any) -> TrainSettings:
    base = {"kind": kind, "model": str(folder / "model" / "tiny.toml"), "crops": ((16, 16, 16),), "batch_size": 2, "seed": 1}
    return TrainSettings(**{**base, **changes})


def changes(folder: Path, **more: Any) -> dict[str, Any]:
    """Return overrides of a preset for the tiny networks."""
    base = {"model": str(folder / "model" / "tiny.toml"), "crops": [[16, 16, 16]], "batch_size": 2, "precision": "no",
            "schedule": "constant", "warmup_steps": 1, "validate_every": 1000, "save_every": 1000}  # fmt: skip
    return {f"train.{key}": value for key, value in {**base, **more}.items()}


# --- what the networks see -------------------------------------------------------------------------------


def body_of(labels: np.ndarray, name: str = "a") -> Body:
    """Return a label map as the trainers hold it, of voxels of a millilitre."""
    return Body.packed(name, labels, 1.0)


def test_channels_are_what_the_decoder_gives_and_what_has_none_is_body() -> None:
    table = bodies.channel_table()
    back = to_labels(table)
    for label in range(256):
        known = label in remap_table("raw125").pairs.values() or label == 0
        assert back[label] == (label if known else 200)
    assert table[0] == 0


def test_labels_that_become_body_are_named() -> None:
    labels = np.full((4, 4, 4), 200, np.uint8)
    assert bodies.told_of_lost([body_of(labels)]) == []
    labels[0, 0, :3] = (1, 116, 240)
    assert bodies.told_of_lost([body_of(labels)]) == ["labels without a channel become body: left kidney cyst, label 240"]


@given(st.integers(1, 80), st.data())
def test_a_part_of_a_packed_body_is_that_part(planes: int, data: st.DataObject) -> None:
    labels = np.random.default_rng(planes).integers(0, 256, (planes, 5, 6), dtype=np.uint8)
    start = data.draw(st.integers(0, planes - 1))
    place = (slice(start, data.draw(st.integers(start + 1, planes))), slice(1, 4), slice(2, 6))
    body = body_of(labels)
    assert np.array_equal(body.part(place), labels[place])
    assert np.array_equal(body.labels, labels)
    assert body.counts.tolist() == [np.count_nonzero(labels == label) for label in range(256)]


def test_rare_organs_weigh_more() -> None:
    labels = np.full((10, 10, 10), 200, np.uint8)
    labels[:1], labels[1, :1], labels[1, 1, 0] = 0, 1, 3  # 100 of air, 10 of liver, 1 of spleen, 889 of body
    table = bodies.channel_table()
    weights = bodies.channel_weights([body_of(labels)], 1.0)
    assert len(weights) == 125
    assert weights[table[[0, 1, 3, 200]]].tolist() == pytest.approx([0.55, 5.5, 10, 0.1])  # the median is 55; within 0.1 and 10
    assert weights[table[5]] == 1
    half = bodies.channel_weights([body_of(labels)], 0.5)
    assert half[table[[0, 1]]].tolist() == pytest.approx([0.55**0.5, 5.5**0.5])
    assert (bodies.channel_weights([body_of(labels)], 0.0) == 1).all()


def test_dice_of_each_label_is_twice_the_overlap_over_both() -> None:
    wanted = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    made = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3])
    assert dice_of(made, wanted) == pytest.approx({1: 2 * 2 / (3 + 3), 2: 2 * 2 / (3 + 2)})  # 3 is nowhere, and is not judged


def test_a_body_is_put_on_the_cube_and_measured(folder: Path) -> None:
    spec = find_model(str(folder / "model" / "tiny.toml"))
    found = list(bodies.read_bodies(read_list(folder / "data"), spec))
    assert all(body.labels.shape == (32, 32, 32) for body in found)
    volumes = [np.count_nonzero(body.labels == maisi().id("liver")) * 1.5**3 / 1000 for body in found]
    assert [body.volumes_ml[LIVER] for body in found] == pytest.approx(volumes)
    largest = bodies.largest_of(body.volumes_ml for body in found)
    vectors = bodies.vectors([body.volumes_ml for body in found], largest)
    assert max(vector[LIVER] for vector in vectors) == 1 or largest[LIVER] == 0
    assert all(vector[SLOTS.index("bone lesion")] == ABSENT for vector in vectors)
    assert all(value == ABSENT or 0 < value <= 1 for vector in vectors for value in vector)


def test_the_cube_is_the_model_file_s(folder: Path, tmp_path: Path) -> None:
    assert (bodies.cube(find_model("rflow-ct")).size, bodies.cube(find_model("rflow-ct")).spacing) == ((256,) * 3, (1.5,) * 3)
    assert (bodies.cube(find_model("nano-mask")).size, bodies.cube(find_model("nano-mask")).spacing) == ((128,) * 3, (3.0,) * 3)
    text = (folder / "model" / "tiny.toml").read_text().replace("out_channels = 125", "out_channels = 124")
    (tmp_path / "other.toml").write_text(text)
    with pytest.raises(UsageError, match="has 124 channels, and labels have 125"):
        bodies.cube(find_model(str(tmp_path / "other.toml")))


def test_models_without_mask_networks_and_cases_without_labels_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nano-ct has no mask networks"):
        mask_vae.task(settings_of(folder, model="nano-ct"), folder / "data")
    shutil.copytree(folder / "data", tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "list.json").read_text())
    file = tmp_path / "data" / rows["training"][0]["label"]
    mask = read_mask(file)
    write_mask(replace(mask, array=np.where(mask.array == 200, 0, mask.array)), file, force=True)
    with pytest.raises(UsageError, match="has no body envelope"):
        mask_vae.task(settings_of(folder), tmp_path / "data")
    del rows["training"][0]["label"]
    (tmp_path / "data" / "list.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="has no label map"):
        mask_vae.task(settings_of(folder), tmp_path / "data")
    with pytest.raises(UsageError, match="needs the mask autoencoder"):
        mask_dm.task(settings_of(folder, "mask-dm"), folder / "data")


@pytest.mark.parametrize("crop", [(18, 16, 16), (16, 16, 36), (0, 16, 16)])
def test_patches_that_cannot_be_cut_are_refused(folder: Path, crop: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="patches of 32x32x32 voxels are cut"):
        mask_vae.task(settings_of(folder, crops=(crop,)), folder / "data")


def test_patches_are_parts_of_the_bodies_and_never_flipped(folder: Path) -> None:
    task = MaskVaeTask(settings_of(folder, batch_size=6), folder / "data")
    batch = task.batch(np.random.default_rng(0))
    assert batch["labels"].shape == (6, 1, 16, 16, 16)
    of = {body.id: body.labels for body in task.bodies}
    for name, patch in zip(batch["ids"], batch["labels"][:, 0].numpy(), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(of[name], (16, 16, 16))
        assert any(np.array_equal(windows[i, j, k], patch) for i, j, k in np.ndindex(*windows.shape[:3]))


def test_learning_begins_with_how_frequent_labels_are(folder: Path) -> None:
    """The last bias alone says so: a network whose last weights are zero gives each channel its share of the bodies' voxels."""
    task = MaskVaeTask(settings_of(folder), folder / "data")
    last = [module for module in task.network.decoder.modules() if isinstance(module, torch.nn.Conv3d)][-1]  # type: ignore[union-attr]
    torch.nn.init.zeros_(last.weight)
    made, _, sigma = task.network(torch.zeros(1, 8, 8, 8, 8))
    channels = task.table[torch.from_numpy(np.stack([body.labels for body in task.bodies])).long()]
    shares = torch.bincount(channels.reshape(-1), minlength=125).clamp(min=1).double()
    found = made[0].softmax(dim=0).detach().reshape(125, -1).double()
    assert torch.allclose(found, (shares / shares.sum())[:, None].expand_as(found), rtol=1e-2)
    assert float(sigma.detach().log().mean()) == pytest.approx(-4, abs=1)


def test_weights_to_start_from_stay_as_they_are(folder: Path, weights: Path) -> None:
    task = MaskVaeTask(settings_of(folder, init=str(weights)), folder / "data")
    assert all(torch.equal(task.network.state_dict()[key], value.float()) for key, value in load_file(weights).items())


def test_slab_by_slab_gives_what_the_whole_network_gives(folder: Path) -> None:
    task = MaskVaeTask(settings_of(folder), folder / "data")
    labels = torch.from_numpy(task.bodies[0].labels)[None, None]
    with torch.no_grad():
        mean, _ = task.network.encode(binarise(labels))  # type: ignore[operator]
        whole = task.network.decode(mean)[0].argmax(dim=0)  # type: ignore[operator]
        made = task.channels_of(task.network, labels)
    assert (made == whole).float().mean() > 0.999  # equal but where two channels are as good as equal
    latent = mask_dm.encoded(task.network, task.bodies[0], torch.device("cpu"))
    assert np.abs(latent.astype(np.float32) - mean[0].numpy()).max() < 2e-3 * float(mean.abs().max())


# --- training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    return train("mask-vae", data=folder / "data", out=folder / "vae", overrides=changes(folder, steps=2, crops=[[32, 32, 32]]))


@pytest.mark.parametrize("kind", ["mask-vae", "mask-dm"])
def test_two_and_two_steps_are_four(folder: Path, weights: Path, tmp_path: Path, kind: str) -> None:
    more = {"vae": str(weights)} if kind == "mask-dm" else {}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for number, count in enumerate(steps):
            train(kind, data=folder / "data", out=tmp_path / name, overrides=changes(folder, steps=count, **more),
                  resume="auto" if number else None)  # fmt: skip
    for part in ("model", "average", "optimiser"):
        one, two = (load_file(tmp_path / name / "checkpoints" / "step_00000004" / f"{part}.safetensors") for name in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask-vae", "mask-dm"])
def test_a_run_that_is_killed_at_any_file_operation_goes_on_bit_equal(folder: Path, weights: Path, tmp_path: Path, kind: str) -> None:
    more = {"vae": str(weights)} if kind == "mask-dm" else {}
    table = changes(folder, steps=4, max_minutes=None, save_every=2, validate_every=2, device="cpu", **more)
    killed_anywhere({"kind": kind, "data": str(folder / "data"), "overrides": table}, tmp_path)


@pytest.fixture(scope="module")
def generator(folder: Path, weights: Path) -> Path:
    """The folder of a run of `train mask-dm`."""
    train("mask-dm", data=folder / "data", out=folder / "dm", overrides=changes(folder, steps=2, vae=str(weights)))
    return folder / "dm"


def mask_of(model: Path, out: Path) -> Sample:
    """Make one mask with a model's mask networks."""
    (sample,) = generate(
        model=str(model), mode="mask", mask_source="diffusion", mask_steps=2, seed=1, out=str(out), size="32x32x32",
        spacing="1.5x1.5x1.5", regions=(), anatomy=(), preview=False, allow_ood=True,
    )  # fmt: skip
    return sample


def test_the_command_trains_and_prints_the_weights(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [word for key, value in changes(folder, steps=1).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    line = ["train", "mask-dm", "--data", str(folder / "data"), "--vae", str(weights), "--out", "dm", *sets]
    assert cli.run(line) == 0
    assert capsys.readouterr().out == "dm/mask_unet.safetensors\n"
    assert len(read_vectors(tmp_path / "dm" / "all_anatomy_size_conditions.json")) == 2


def test_what_was_trained_makes_masks_wherever_its_runs_lie(folder: Path, weights: Path, generator: Path, tmp_path: Path) -> None:
    """From the model file that the training wrote, also when the runs were moved together."""
    sample = mask_of(generator / "model.toml", tmp_path / "made")
    assert nibabel.load(sample.paths["label"]).shape == (32, 32, 32)
    assert {part["part"] for part in sample.record["model"]["weights"]} == {"mask_vae", "mask_unet"}
    for run in (weights.parent, generator):
        shutil.copytree(run, tmp_path / "moved" / run.name)
    moved = mask_of(tmp_path / "moved" / "dm" / "model.toml", tmp_path / "again")
    assert np.array_equal(read_mask(moved.paths["label"]).array, read_mask(sample.paths["label"]).array)


def test_the_model_file_replaces_the_mask_networks_alone(folder: Path, generator: Path, tmp_path: Path) -> None:
    made, base = find_model(str(generator / "model.toml")), find_model(str(folder / "model" / "tiny.toml"))
    assert made.name == "tiny-own-masks"
    for name in ("networks", "limits", "scheduler", "mask_scheduler", "modes", "licence"):
        assert getattr(made, name) == getattr(base, name)
    kept = {weight.part: base.weight_path(weight) for weight in base.weights if weight.part in ("vae", "unet", "controlnet")}
    files = {weight.part: made.weight_path(weight) for weight in made.weights}
    assert {part: files[part] for part in kept} == kept
    own = {"mask_vae": folder / "vae" / "mask_vae.safetensors", "mask_unet": generator / "mask_unet.safetensors",
           "data": generator / "all_anatomy_size_conditions.json"}  # fmt: skip
    assert {part: files[part].resolve() for part in own} == {part: file.resolve() for part, file in own.items()}
    released = find_model("rflow-ct")
    mask_model.write(tmp_path / "model.toml", released, {part: tmp_path / f"{part}.x" for part in own})
    again = find_model(str(tmp_path / "model.toml"))
    hub = {weight for weight in released.weights if weight.part in kept or (weight.part == "data" and "anatomy" not in weight.path)}
    assert {weight for weight in again.weights if weight.repo} == hub


def test_a_user_s_sizes_are_not_overwritten(folder: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "all_anatomy_size_conditions.json").write_text("mine")
    with pytest.raises(UsageError, match=r"all_anatomy_size_conditions\.json already exists"):
        train("mask-dm", data=folder / "data", out=tmp_path, overrides=changes(folder, steps=1, vae=str(weights)))
    assert [path.name for path in tmp_path.iterdir()] == ["all_anatomy_size_conditions.json"]
    assert (tmp_path / "all_anatomy_size_conditions.json").read_text() == "mine"


def test_the_weights_tell_the_dice_of_each_label(folder: Path, weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        about = file.metadata()
    dice = json.loads(about["dice"])
    (held,) = (body for body in bodies.read_bodies(read_list(folder / "data"), find_model(str(folder / "model" / "tiny.toml")))
               if body.id == "phantom0002")  # fmt: skip
    assert set(dice) == {maisi().name_of(int(label)) for label in np.flatnonzero(held.counts) if label}
    assert float(about["score"]) == pytest.approx(1 - np.mean(list(dice.values())), abs=1e-3)


def test_the_noise_is_predicted_as_generate_predicts_it(folder: Path, weights: Path) -> None:
    task = dm_task(folder, weights)
    network = task.network.eval()
    spec, precision = task.spec, Precision.named("fp32", torch.device("cpu"))
    nets = Networks(spec=spec, parts={"mask_unet": network}, scale_factor=1.0, device=torch.device("cpu"), precision=precision)
    x = torch.randn(1, 4, 8, 8, 8)
    with torch.no_grad():
        ours = task.predict(network, x, torch.tensor([350]), torch.tensor([task.vectors[0]], dtype=torch.float32))
    assert torch.allclose(denoiser(nets, task.vectors[0])(x, torch.tensor(350.0)), ours, atol=1e-5)


def dm_task(folder: Path, weights: Path, **more: Any) -> MaskDiffusionTask:
    """Return the task of `train mask-dm`, with its bodies encoded."""
    task = MaskDiffusionTask(settings_of(folder, "mask-dm", vae=str(weights), **more), folder / "data")
    task.to(torch.device("cpu"))
    return task


def test_latents_are_scaled_to_a_deviation_of_one_over_all_bodies(folder: Path, weights: Path) -> None:
    task = dm_task(folder, weights)
    everything = np.stack(task.latents).astype(np.float64)
    assert task.scale == pytest.approx(1 / everything.std())
    assert task.metadata("mask_unet")["scale_factor"] == repr(task.scale)
    assert (len(task.latents), len(task.held), task.vae, task.packed) == (2, 1, None, [])


def test_fine_tuning_keeps_the_scales_of_latents_and_sizes(folder: Path, weights: Path, generator: Path, tmp_path: Path) -> None:
    first = dm_task(folder, weights)
    tensors = load_file(generator / "mask_unet.safetensors")
    file = tmp_path / "other.safetensors"
    save_file(tensors, file, {"scale_factor": "0.5", "largest_ml": json.dumps([1000.0] * 10)})
    task = dm_task(folder, weights, init=str(file))
    assert (task.scale, task.largest) == (0.5, (1000.0,) * 10)
    assert task.vectors == [tuple(size if size == ABSENT else size * most / 1000 for size, most in zip(vector, first.largest, strict=True))
                            for vector in first.vectors]  # fmt: skip
    save_file(tensors, file, {"scale_factor": "0.5"})
    task = dm_task(folder, weights, init=str(file))
    assert task.largest == first.largest
    assert any("does not tell what its sizes are shares of" in note for note in task.notes)
    for wrong in ("[1, 2]", "three", '["a"]'):
        save_file(tensors, file, {"largest_ml": wrong})
        with pytest.raises(UsageError, match="largest_ml"):
            dm_task(folder, weights, init=str(file))


def test_sizes_are_told_as_absent_now_and_then(folder: Path, weights: Path) -> None:
    task = dm_task(folder, weights, size_dropout=0.5, batch_size=200)
    task.vectors = [(0.5,) * 10] * 2
    sizes = task.batch(np.random.default_rng(0))["sizes"]
    assert set(sizes.unique().tolist()) == {ABSENT, 0.5}
    assert float((sizes == ABSENT).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_two_bodies_are_learned_by_heart(folder: Path, tmp_path: Path) -> None:
    """The mean Dice of what was seen exceeds 0.95, and the noise is predicted with a squared error below 0.2."""
    (tmp_path / "model").mkdir()
    text = (folder / "model" / "tiny.toml").read_text().replace("latent_size = [8, 8, 8]", "latent_size = [4, 4, 4]")
    (tmp_path / "model" / "tiny.toml").write_text(text)
    rows = []
    for number, (liver, lung) in enumerate(((6, 4), (4, 8))):
        labels = np.zeros((16, 16, 16), np.uint8)
        labels[1:15, 2:14] = 200
        labels[2 : 2 + liver, 4:10, 2:8] = maisi().id("liver")
        labels[9:14, 4:10, 15 - lung :] = maisi().id("left lung upper lobe")
        write_mask(Mask(array=labels, geometry=Geometry(size=(16,) * 3, spacing=(1.5,) * 3)), tmp_path / f"{number}.nii.gz")
        rows += [{"id": f"{number}{fold}", "label": f"{number}.nii.gz", "spacing": [1.5] * 3, "modality": "ct", "fold": fold}
                 for fold in (0, 1)]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps({"training": rows}))
    base = changes(tmp_path, lr=1e-2, ema_decay=0.9)
    once = {"train.steps": 100, "train.batch_size": 1}
    vae = train("mask-vae", data=tmp_path / "list.json", out=tmp_path / "vae", overrides={**base, **once})
    with safe_open(vae, framework="pt") as file:
        assert np.mean(list(json.loads(file.metadata()["dice"]).values())) > 0.95
    more = {"train.steps": 150, "train.batch_size": 8, "train.vae": str(vae)}
    train("mask-dm", data=tmp_path / "list.json", out=tmp_path / "dm", overrides={**base, **more})
    rows = [json.loads(line) for line in (tmp_path / "dm" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert math.fsum(losses[-50:]) / 50 < 0.2
