"""`train mask-vae` and `train mask-dm`: an anatomy generator of one's own, from label maps to `generate`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from maisi_cli import cli, generate
from maisi_cli.anatomy import maisi, remap_table
from maisi_cli.catalog import model as find_model
from maisi_cli.errors import UsageError
from maisi_cli.masks.denoising import to_labels
from maisi_cli.masks.sizes import ABSENT, SLOTS, read_vectors
from maisi_cli.testing import TINY
from maisi_cli.train import TrainSettings, bodies, mask_dm, mask_vae, train
from maisi_cli.train.data import make_phantoms, read_list
from maisi_cli.train.mask_vae import MaskVaeTask
from safetensors.torch import load_file

from .fakehub import _MASK_NETWORKS

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks")
    make_phantoms(path / "data", 3, size=32, workers=1)
    (path / "model").mkdir()
    head, _, tail = TINY.partition("[[weights]]")
    networks = _MASK_NETWORKS.replace("out_channels = 5", "out_channels = 125")
    (path / "model" / "tiny.toml").write_text(f"{head}{networks}\n[[weights]]{tail}{WEIGHTS}")
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


def test_channels_are_what_the_decoder_gives_and_what_has_none_is_body() -> None:
    table = bodies.channel_table()
    back = to_labels(table)
    for label in range(256):
        known = label in remap_table("raw125").pairs.values() or label == 0
        assert back[label] == (label if known else 200)
    assert table[0] == 0


def test_a_body_is_put_on_the_cube_and_measured(folder: Path) -> None:
    spec = find_model(str(folder / "model" / "tiny.toml"))
    cases = read_list(folder / "data")
    found = bodies.read_bodies(cases, spec)
    assert all(body.labels.shape == (32, 32, 32) for body in found)
    volumes = [np.count_nonzero(body.labels == maisi().id("liver")) * 1.5**3 / 1000 for body in found]
    assert [body.volumes_ml[LIVER] for body in found] == pytest.approx(volumes)
    largest = bodies.largest_of(found)
    vectors = bodies.vectors(found, largest)
    assert max(vector[LIVER] for vector in vectors) == 1 or largest[LIVER] == 0
    assert all(vector[SLOTS.index("bone lesion")] == ABSENT for vector in vectors)
    assert all(value == ABSENT or 0 < value <= 1 for vector in vectors for value in vector)


def test_models_without_mask_networks_and_cases_without_labels_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nano-ct has no mask networks"):
        mask_vae.task(settings_of(folder, model="nano-ct"), folder / "data")
    shutil.copytree(folder / "data", tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "list.json").read_text())
    del rows["training"][0]["label"]
    (tmp_path / "data" / "list.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="has no label map"):
        mask_vae.task(settings_of(folder), tmp_path / "data")
    with pytest.raises(UsageError, match="needs the mask autoencoder"):
        mask_dm.task(settings_of(folder, "mask-dm"), folder / "data")


def test_patches_are_parts_of_the_bodies_and_never_flipped(folder: Path) -> None:
    task = MaskVaeTask(settings_of(folder, batch_size=6), folder / "data")
    batch = task.batch(np.random.default_rng(0))
    assert batch["labels"].shape == (6, 1, 16, 16, 16)
    of = {body.id: body.labels for body in task.bodies}
    for name, patch in zip(batch["ids"], batch["labels"][:, 0].numpy(), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(of[name], (16, 16, 16))
        assert any(np.array_equal(windows[i, j, k], patch) for i, j, k in np.ndindex(*windows.shape[:3]))


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


def test_what_was_trained_makes_masks(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line from end to end: both networks, their sizes, and a mask by `generate --mask-source diffusion`."""
    monkeypatch.chdir(tmp_path)
    sets = [word for key, value in changes(folder, steps=2).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    line = ["train", "mask-dm", "--data", str(folder / "data"), "--vae", str(weights), "--out", "dm", *sets]
    assert cli.run(line) == 0
    assert capsys.readouterr().out == "dm/mask_unet.safetensors\n"
    vectors = read_vectors(tmp_path / "dm" / "all_anatomy_size_conditions.json")
    assert len(vectors) == 2
    shutil.copytree(folder / "model", tmp_path / "model")
    for source in (weights, tmp_path / "dm" / "mask_unet.safetensors", tmp_path / "dm" / "all_anatomy_size_conditions.json"):
        shutil.copy(source, tmp_path / "model" / source.name)
    (sample,) = generate(
        model=str(tmp_path / "model" / "tiny.toml"), mode="mask", mask_source="diffusion", mask_steps=2, seed=1, out="made",
        size="32x32x32", spacing="1.5x1.5x1.5", regions=(), anatomy=(), preview=False, allow_ood=True,
    )  # fmt: skip
    assert nibabel.load(sample.paths["label"]).shape == (32, 32, 32)
    assert {part["part"] for part in sample.record["model"]["weights"]} == {"mask_vae", "mask_unet"}


@pytest.mark.slow
def test_two_bodies_are_learned_by_heart(folder: Path, tmp_path: Path) -> None:
    """The autoencoder's mean Dice on the bodies that it saw exceeds 0.4, and the noise is predicted with an error below 0.5."""
    vae = train("mask-vae", data=folder / "data", out=tmp_path / "vae",
                overrides=changes(folder, steps=400, lr=5e-3, overfit=2, crops=[[32, 32, 32]], batch_size=1, ema_decay=0.95))  # fmt: skip
    scores = [json.loads(line) for line in (tmp_path / "vae" / "log.jsonl").read_text().splitlines()]
    assert max(row["val_dice"] for row in scores if "val_dice" in row) > 0.4
    train("mask-dm", data=folder / "data", out=tmp_path / "dm",
          overrides=changes(folder, steps=400, lr=3e-3, overfit=2, vae=str(vae), batch_size=4, ema_decay=0.95))  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "dm" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert math.fsum(losses[-50:]) / 50 < 0.5
