"""Training: data lists, losses against closed forms and the reference, exact resuming, refusals, learning."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from maisi_cli import cli
from maisi_cli import train as training
from maisi_cli.catalog import model as find_model
from maisi_cli.errors import MaisiError, UsageError
from maisi_cli.events import Event, Saved, Step
from maisi_cli.networks import build
from maisi_cli.train import TrainSettings, diffusion, losses, settings_from, train
from maisi_cli.train.controlnet import ControlNetTask, add_residuals_out_of_place, copy_matching
from maisi_cli.train.data import Case, encode, intensity, make_phantoms, read_list, split
from maisi_cli.train.diffusion import DiffusionTask, draw_times, mix, scale_factor
from maisi_cli.train.optimisation import average_into, learning_rate
from maisi_cli.train.overfit import only
from maisi_cli.train.recompute import recompute
from maisi_cli.train.vae import noise_latents
from maisi_cli.volumes import read_image, read_mask
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .killing import killed_anywhere

PRESETS = Path(__file__).resolve().parents[1] / "presets" / "train"
KINDS = ("vae", "dm", "controlnet")
NAMES = {"vae": "vae", "dm": "unet", "controlnet": "controlnet"}

MODEL = """
schema = "maisi.model/1"
name = "tiny"
summary = "for tests"
modality = "ct"
modalities = ["ct"]
modes = ["paired", "image", "mask"]
[licence]
name = "Apache-2.0"
[limits]
size_min = 16
size_max = 64
[scheduler]
name = "rflow"
[networks.vae]
kind = "autoencoder_kl_maisi"
spatial_dims = 3
in_channels = 1
out_channels = 1
latent_channels = 4
num_channels = [4, 8, 8]
num_res_blocks = [1, 1, 1]
norm_num_groups = 2
attention_levels = [false, false, false]
with_encoder_nonlocal_attn = false
with_decoder_nonlocal_attn = false
use_checkpointing = false
use_convtranspose = false
[networks.unet]
kind = "unet_maisi"
spatial_dims = 3
in_channels = 4
out_channels = 4
num_channels = [8, 16]
attention_levels = [false, true]
num_head_channels = [0, 8]
num_res_blocks = 1
include_spacing_input = true
include_top_region_index_input = false
include_bottom_region_index_input = false
num_class_embeds = 128
resblock_updown = true
include_fc = true
norm_num_groups = 4
[networks.controlnet]
kind = "controlnet_maisi"
spatial_dims = 3
in_channels = 4
num_channels = [8, 16]
attention_levels = [false, true]
num_head_channels = [0, 8]
num_res_blocks = 1
conditioning_embedding_in_channels = 8
conditioning_embedding_num_channels = [4, 8, 8]
num_class_embeds = 128
resblock_updown = true
include_fc = true
norm_num_groups = 4
use_checkpointing = false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, three phantoms (one held out), their latents, a VAE and two UNets."""
    root = tmp_path_factory.mktemp("train")
    (root / "tiny.toml").write_text(MODEL, "utf-8")
    listed = make_phantoms(root / "data", 3, size=32, seed=4)
    rows = json.loads(listed.read_text("utf-8"))
    rows["training"][2]["fold"] = 0
    listed.write_text(json.dumps(rows), "utf-8")
    run(root, "vae", root / "first", steps=1)
    encode(root / "data", root / "first" / "vae.safetensors", model=str(root / "tiny.toml"), device="cpu")
    run(root, "dm", root / "second", steps=1)
    run(root, "dm", root / "third", steps=40, lr=5e-3, batch_size=4, ema_decay=0.9)
    return root


def overrides(root: Path, kind: str, **changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "model": str(root / "tiny.toml"), "steps": 4, "max_minutes": None, "device": "cpu", "warmup_steps": 2,
        "lr": 1e-3, "crops": ((16, 16, 16),) if kind == "vae" else ((4, 4, 4),), "validate_every": 1000,
        "save_every": 1000, "precision": "no",
    }  # fmt: skip
    if kind == "controlnet":
        table["unet"] = str(root / "third" / "unet.safetensors")
        table["train_unet"] = False
    return {**table, **changes}


def run(root: Path, kind: str, out: Path, *, resume: str | None = None, force: bool = False,
        on_event: Callable[[Event], None] = lambda _event: None, **changes: Any) -> Path:  # fmt: skip
    table = overrides(root, kind, **changes)
    return train(kind, data=root / "data", out=out, overrides=table, resume=resume, force=force, on_event=on_event)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def latest(out: Path) -> Path:
    """Return the folder of the last checkpoint of a run."""
    return sorted((out / "checkpoints").glob("step_*"))[-1]


def state_of(out: Path) -> dict[str, Any]:
    """Return what the last checkpoint of a run holds: the scalars of `state.json`, and the tensors by file."""
    tensors = {path.stem: load_file(path) for path in latest(out).glob("*.safetensors")}
    return {**json.loads((latest(out) / "state.json").read_text("utf-8")), **tensors}


# --- the loop -----------------------------------------------------------------------------


class Interrupt:
    """Send this process SIGTERM once a step is done, as a cluster does before it takes the machine away."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and event.stage.startswith("train") and event.done == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in KINDS), ("controlnet", {"train_unet": True, "label_dropout": 0.5})])
def test_resuming_is_bit_equal(folder: Path, tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(folder, kind, whole, **changes)
    run(folder, kind, parts, on_event=Interrupt(2), **changes)
    assert state_of(parts)["step"] == 2
    run(folder, kind, parts, resume="auto", **changes)
    one, two = state_of(whole), state_of(parts)
    assert one["step"] == two["step"] == 4
    for key in ("model", "average", "optimiser", "rng"):
        assert one[key].keys() == two[key].keys()
        assert all(torch.equal(value, two[key][name]) for name, value in one[key].items()), key
    assert len(one["optimiser"]) > 20
    assert one["numpy_rng"] == two["numpy_rng"]
    assert [row["loss"] for row in rows_of(whole) if "loss" in row] == [row["loss"] for row in rows_of(parts) if "loss" in row]


def test_another_seed_trains_otherwise(folder: Path, tmp_path: Path) -> None:
    run(folder, "dm", tmp_path / "a", steps=2)
    run(folder, "dm", tmp_path / "b", steps=2, seed=1)
    a, b = (state_of(tmp_path / name)["model"] for name in "ab")
    assert any(not torch.equal(value, b[name]) for name, value in a.items())


def test_validation_changes_nothing(folder: Path, tmp_path: Path) -> None:
    run(folder, "dm", tmp_path / "often", validate_every=1)
    run(folder, "dm", tmp_path / "once")
    often, once = (state_of(tmp_path / name)["model"] for name in ("often", "once"))
    assert all(torch.equal(value, once[name]) for name, value in often.items())


def test_phantoms_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    lists = [make_phantoms(tmp_path / str(workers), 2, size=32, seed=4, workers=workers) for workers in (1, 2)]
    one, two = (read_list(path) for path in lists)
    assert lists[0].read_text("utf-8") == lists[1].read_text("utf-8")
    for a, b in zip(one, two, strict=True):
        assert a.image is not None
        assert b.image is not None
        assert np.array_equal(read_image(a.image).array, read_image(b.image).array)


def test_automatic_resuming_of_nothing_starts(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "dm", tmp_path / "new", steps=1, resume="auto").is_file()


def test_a_run_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "second", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="exists"):
        run(folder, "dm", tmp_path / "run", steps=1, seed=5)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    run(folder, "dm", tmp_path / "run", steps=1, seed=5, force=True)
    state = latest(tmp_path / "run") / "state.json"
    assert state.read_bytes() != before[state]


def test_other_networks_weights_in_the_folder_are_kept(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "first" / "vae.safetensors", tmp_path / "vae.safetensors")
    run(folder, "dm", tmp_path, steps=1)
    assert (tmp_path / "vae.safetensors").exists()


def test_a_stopped_run_saves_before_it_validates(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    original = DiffusionTask.validate

    def validate(self: DiffusionTask, network: nn.Module) -> dict[str, float]:
        saved.append(latest(tmp_path / "run").name)
        return original(self, network)

    monkeypatch.setattr(DiffusionTask, "validate", validate)
    run(folder, "dm", tmp_path / "run", on_event=Interrupt(2))
    assert saved == ["step_00000002"]


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
        calls.append(kind)
        return losses.distance(prediction, target, kind) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(diffusion, "distance", broken)
    with pytest.raises(MaisiError, match=r"stopped at step 2 \(cases phantom\d+\): its loss is nan"):
        run(folder, "dm", tmp_path / "run", save_every=1, on_nan="stop")
    state = state_of(tmp_path / "run")
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_gradient_that_is_not_finite_is_left_out_and_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = [], []

    class Broken(torch.autograd.Function):
        """The value as it is, with a gradient of infinity."""

        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * math.inf

    def sometimes(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
        calls.append(kind)
        loss = losses.distance(prediction, target, kind)
        return Broken.apply(loss) if bad(len(calls)) else loss  # type: ignore[no-any-return]

    monkeypatch.setattr(diffusion, "distance", sometimes)
    bad = (2).__eq__
    run(folder, "dm", tmp_path / "run", on_event=said.append)
    state = state_of(tmp_path / "run")
    assert (state["step"], state["draws"], state["spoiled"]) == (4, 5, 0)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert sum("left out a batch" in getattr(event, "text", "") for event in said) == 1
    calls.clear()
    bad = (1).__le__
    with pytest.raises(MaisiError, match="left out 5 batches in a row"):
        run(folder, "dm", tmp_path / "all")


def test_time_limit_ends_the_run(folder: Path, tmp_path: Path) -> None:
    run(folder, "dm", tmp_path / "run", steps=10**6, max_minutes=0.01)
    steps = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert 1 <= len(steps) < 10**4
    assert steps[-1]["seconds"] <= 0.6


def test_events_log_and_export(folder: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    weights = run(folder, "dm", tmp_path / "run", on_event=events.append)
    assert [event.done for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
    assert [event.path for event in events if isinstance(event, Saved)] == [weights]
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert sum("val_score" in row for row in rows) == 1
    average = state_of(tmp_path / "run")["average"]
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(average)
        for key in average:
            assert file.get_tensor(key).dtype == torch.float16
            assert torch.equal(file.get_tensor(key), average[key].half())
    assert metadata["part"] == "unet"
    assert float(metadata["scale_factor"]) > 0


@pytest.mark.parametrize(("kind", "by"), [("vae", 20), ("dm", 0.05), ("controlnet", 0.005)])
def test_training_improves_validation(folder: Path, tmp_path: Path, kind: str, by: float) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    for name in ("list.json", "latents.json"):  # the last case is trained on and held out: learning by heart is what counts here
        rows = json.loads((tmp_path / "data" / name).read_text("utf-8"))["training"]
        again = {**rows[-1], "id": "again", "fold": 0}
        (tmp_path / "data" / name).write_text(json.dumps({"training": [*({**row, "fold": 1} for row in rows), again]}), "utf-8")
    changes = {"steps": 60, "lr": 5e-3, "batch_size": 4, "whole_share": 1.0, "validate_every": 5, "ema_decay": 0.9}
    out = tmp_path / "run"
    train(kind, data=tmp_path / "data", out=out, overrides=overrides(folder, kind, **changes))
    scores = [row["val_score"] for row in rows_of(out) if "val_score" in row]
    assert scores[-1] < scores[0] - by
    with safe_open(out / f"{NAMES[kind]}.safetensors", framework="pt") as file:
        assert float(file.metadata()["score"]) == pytest.approx(min(scores), rel=1e-4)  # the best is exported


HEART = {"vae": (60, 0.65), "dm": (150, 0.8), "controlnet": (100, 0.96)}
"""Steps, and the share of the first losses that the last ones must fall below, when two cases are learned by heart."""


@pytest.mark.parametrize("kind", KINDS)
def test_each_trainer_learns_two_cases_by_heart(folder: Path, tmp_path: Path, kind: str) -> None:
    """Means over steps: the noise of flow matching makes single losses jump. Without learning they are 1.00, 1.00 and 0.97."""
    steps, bound = HEART[kind]
    run(folder, kind, tmp_path / "run", overfit=2, steps=steps, lr=5e-3, batch_size=4, ema_decay=0.9, final_lr=0.2)
    found = [row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row]
    assert np.mean(found[-20:]) < bound * np.mean(found[:10])


def test_overfitting_takes_the_first_training_cases_alone(folder: Path) -> None:
    data = folder / "data"
    with only(data, 1) as chosen:
        for name in ("list.json", "latents.json"):
            (case,), (held,) = split(read_list(chosen / name))
            assert case.id == read_list(data / name)[0].id
            assert dataclasses.replace(held, id=case.id, fold=1) == case  # validation looks at what is learned
            for key in ("image", "label", "latent"):
                path = getattr(case, key)
                assert path is None or path.is_file()
    assert not chosen.exists()
    with only(data / "latents.json", 2) as chosen:
        assert [case.id for case in split(read_list(chosen))[0]] == [case.id for case in split(read_list(data / "latents.json"))[0]]
    with only(data, None) as chosen:
        assert chosen == data
    with pytest.raises(UsageError, match="has 2 training cases, not 3"), only(data, 3):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_number(folder: Path, tmp_path: Path, kind: str) -> None:
    run(folder, kind, tmp_path / "kept", steps=2)
    run(folder, kind, tmp_path / "again", steps=2, recompute=True)
    kept, again = (state_of(tmp_path / name)["model"] for name in ("kept", "again"))
    assert all(torch.equal(value, again[key]) for key, value in kept.items())


def test_recomputed_blocks_keep_their_input_alone(folder: Path) -> None:
    network = build(find_model(str(folder / "tiny.toml")).networks["vae"])
    image = torch.rand(1, 1, 32, 32, 32)

    def kept() -> int:
        """Return the bytes that the forward pass keeps for the way back, each storage once."""
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            keep = network(image)
        del keep
        return sum(found.values())

    before = kept()
    assert recompute(network) == recompute(network) > 5
    assert kept() < 0.7 * before
    with pytest.raises(UsageError, match="no residual blocks"):
        recompute(nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_agrees_and_goes_on(folder: Path, tmp_path: Path) -> None:
    run(folder, "dm", tmp_path / "plain")
    run(folder, "dm", tmp_path / "fast", compile=True, on_event=Interrupt(2))
    run(folder, "dm", tmp_path / "fast", compile=True, resume="auto")
    plain, fast = (state_of(tmp_path / name)["model"] for name in ("plain", "fast"))
    assert plain.keys() == fast.keys()
    assert all(torch.allclose(value, fast[key], atol=1e-4) for key, value in plain.items())


LATENT = {"latent_noise": 0.0}  # its deviation is that of each part of the batch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"), [("vae", LATENT), ("dm", {}), ("controlnet", {}), ("controlnet", {"train_unet": True, "label_dropout": 0.5})]
)
def test_two_processes_train_as_one_for_each_trainer(folder: Path, tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    run(folder, kind, tmp_path / "one", batch_size=2, **changes)
    table = overrides(folder, kind, **changes)
    train(kind, data=folder / "data", out=tmp_path / "two", overrides=table, gpus=2)
    one, two = ([row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_trainer_that_is_killed_at_any_file_operation_goes_on_bit_equal(folder: Path, tmp_path: Path, kind: str) -> None:
    killed_anywhere(
        {"kind": kind, "data": str(folder / "data"), "overrides": overrides(folder, kind, save_every=2, validate_every=2)}, tmp_path
    )


@given(st.integers(0, 100), st.floats(0, 1), st.sampled_from(["cosine", "polynomial"]))
def test_learning_rate_rises_and_falls(step: int, progress: float, schedule: str) -> None:
    settings = TrainSettings(kind="dm", lr=2e-4, warmup_steps=10, final_lr=0.1, schedule=schedule)
    rate = learning_rate(settings, step, progress)
    assert 0 < rate <= 2e-4 * (1 + 1e-9)
    assert learning_rate(settings, step, 1.0) <= rate * (1 + 1e-9)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(2e-5)
    assert learning_rate(settings, 100, 1.0) == pytest.approx(2e-5)


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.55), ("polynomial", 0.1 + 0.9 / 4), ("constant", 1.0)])
def test_learning_rate_at_half_time(schedule: str, half: float) -> None:
    settings = TrainSettings(kind="dm", lr=2e-4, warmup_steps=10, final_lr=0.1, schedule=schedule)
    assert learning_rate(settings, 10, 0.5) == pytest.approx(2e-4 * half)


def test_the_polynomial_is_that_of_torch() -> None:
    """PolynomialLR with power 2, which the reference trains with, ends at 0."""
    settings = TrainSettings(kind="dm", lr=0.5, warmup_steps=0, final_lr=0.0, schedule="polynomial")
    theirs = torch.optim.lr_scheduler.PolynomialLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), total_iters=7, power=2)
    for step in range(7):
        assert learning_rate(settings, step, step / 7) == pytest.approx(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()


def test_average_is_exponential() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.zeros(1, 1)}
    nn.init.constant_(network.weight, 8.0)
    for count in range(1, 4):
        average_into(average, network, 0.5)
        assert average["weight"].item() == 8 * (1 - 0.5**count)


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bundled_presets_are_recipes(kind: str) -> None:
    assert (PRESETS / f"nano-{kind}.toml").is_file()
    settings = settings_from(kind, f"nano-{kind}")
    assert settings.kind == kind
    assert settings.model == "nano-ct"
    assert settings.max_minutes is not None
    for crop in settings.crops:
        assert all(n % 4 == 0 for n in crop)  # both the VAE and the UNet halve twice


def test_overrides_win_with_or_without_prefix() -> None:
    assert settings_from("dm", "nano-dm", {"train.lr": 0.5}).lr == 0.5
    assert settings_from("dm", "nano-dm", {"lr": 0.5, "crops": [[8, 8, 8]]}).crops == ((8, 8, 8),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"learning_rate": 1}, "learning_rate"), ({"loss": "l3"}, "loss"), ({"lr": -1.0}, "lr"),
     ({"steps": 0}, "steps"), ({"timesteps": "late"}, "timesteps"), ({"precision": "fp8"}, "precision"),
     ({"accumulate": 0}, "accumulate"), ({"schedule": "step"}, "schedule"), ({"optimiser": "sgd"}, "optimiser"),
     ({"on_nan": "ignore"}, "on_nan"), ({"betas": [0.9]}, "betas"), ({"keep_last": 0}, "keep_last"), ({"overfit": 0}, "overfit"),
     ({"final_lr": 2.0}, "final_lr"), ({"preview_every": -1}, "preview_every"),
     ({"time_shift": 0.0}, "time_shift"), ({"latent_noise": -0.1}, "latent_noise")],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from("dm", "nano-dm", changes)


def test_a_preset_of_another_training_is_refused() -> None:
    with pytest.raises(UsageError, match="trains vae, not dm"):
        settings_from("dm", "nano-vae")
    with pytest.raises(UsageError, match="unet"):
        TrainSettings(kind="unet")


def test_the_page_on_training_names_settings_and_options_there_are() -> None:
    page = (PRESETS.parents[1] / "docs" / "training.md").read_text("utf-8")
    table = page.partition("| Setting |")[2].partition("## Going on")[0]
    rows = [row for row in re.findall(r"^\| (.*?) \| (.*?) \|", table, flags=re.M) if row[0].startswith("`")]
    named = [(name, default) for names, defaults in rows
             for name, default in zip(re.findall(r"`(\w+)`", names), re.split(r", (?![\d.]+\])", defaults), strict=True)]  # fmt: skip
    settings = TrainSettings(kind="vae")
    assert len(named) > 20
    for name, default in named:
        value = getattr(settings, name)
        shown = "none" if value is None else json.dumps(list(value) if isinstance(value, tuple) else value).strip('"')
        assert default == shown or float(default) == value, name
    command = typer.main.get_command(cli.build()).commands["train"].commands["controlnet"]  # type: ignore[attr-defined]
    options = {flag for each in command.params for flag in each.opts} | {"--help"}
    of_launchers = {"--nproc-per-node", "--multi_gpu", "--num_processes", "--use_fsdp", "--fsdp_version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", page)) - options - of_launchers == set()


def test_settings_need_no_torch() -> None:
    read = "from maisi_cli import train; train.settings_from('vae', 'nano-vae')"
    code = f"import sys; {read}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert (*KINDS, "mask-vae", "mask-dm") == training.KINDS


# --- data ---------------------------------------------------------------------------------


def test_phantom_list_has_the_reference_form(folder: Path) -> None:
    rows = json.loads((folder / "data" / "list.json").read_text("utf-8"))["training"]
    assert [row["id"] for row in rows] == ["phantom0000", "phantom0001", "phantom0002"]
    for row in rows:
        image, mask = read_image(folder / "data" / row["image"]), read_mask(folder / "data" / row["label"])
        assert list(image.array.shape) == list(mask.array.shape) == row["dim"]
        assert row["spacing"] == pytest.approx(image.geometry.spacing, abs=1e-4)
        assert row["modality"] == "ct"
        assert len(np.unique(mask.array)) > 15
    training_cases, held = split(read_list(folder / "data"))
    assert [len(training_cases), len(held)] == [2, 1]


def test_phantom_case_depends_on_seed_and_number_alone(folder: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "one", 1, size=32, seed=4)
    make_phantoms(tmp_path / "other", 1, size=32, seed=5)
    for name in ("phantom0000_image.nii.gz", "phantom0000_label.nii.gz"):
        kept, again, other = (read_image(path / name).array for path in (folder / "data", tmp_path / "one", tmp_path / "other"))
        assert np.array_equal(kept, again)
        assert kept.shape != other.shape or not np.array_equal(kept, other)
    with pytest.raises(UsageError, match="exists"):
        make_phantoms(tmp_path / "one", 1, size=32, seed=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a data list"), ('{"testing": []}', "not a data list"),
     ('{"training": 3}', "not a data list"),
     ('{"training": [{"image": null}]}', "spacing"),
     ('{"training": []}', "no cases"),
     ('{"training": [{"image": "gone.nii.gz", "spacing": [1, 1, 1]}]}', "gone.nii.gz")],
)  # fmt: skip
def test_bad_lists_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.json").write_text(content, "utf-8")
    with pytest.raises(UsageError, match=message):
        read_list(tmp_path)


def test_no_list_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data list") as caught:
        read_list(tmp_path)
    assert "maisi data phantom" in str(caught.value.hint)


def case(number: int, fold: int) -> Case:
    return Case(id=str(number), image=None, label=None, latent=None, spacing_mm=(1, 1, 1), modality="ct", fold=fold)


def test_split_needs_something_to_train_on() -> None:
    with pytest.raises(UsageError, match="held out"):
        split([case(0, 0)])
    with pytest.raises(UsageError, match=r"no case .* is held out .fold 0.: its folds are 1, 2"):
        split([case(0, 1), case(1, 2)])
    one, two = case(0, 1), case(1, 2)
    assert split([one, two], 2) == ([one], [two])


def test_intensity_maps_hu_to_the_unit_interval() -> None:
    assert intensity(np.array([-3000, -1000, 0, 500, 1000, 3000])).tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_latents_are_posterior_means_on_the_padded_grid(folder: Path, tmp_path: Path) -> None:
    import nibabel as nib

    rng = np.random.default_rng(0)
    for name, array in (("image", rng.integers(-1000, 1000, (18, 16, 16)).astype(np.int16)),
                        ("label", rng.integers(0, 5, (18, 16, 16)).astype(np.uint8))):  # fmt: skip
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / f"{name}.nii.gz")
    row = {
        "id": "a",
        "image": "image.nii.gz",
        "label": "label.nii.gz",
        "spacing": [2, 2, 3],
        "modality": "ct",
        "fold": 1,
    }
    (tmp_path / "list.json").write_text(json.dumps({"training": [row]}), "utf-8")
    listed = encode(tmp_path, folder / "first" / "vae.safetensors", model=str(folder / "tiny.toml"), device="cpu")
    found = read_list(listed)[0]
    assert found.latent is not None
    assert found.label is not None
    latent, labels = np.load(found.latent), np.load(found.label)
    assert (latent.shape, latent.dtype) == ((4, 5, 4, 4), np.float16)
    assert (labels.shape, labels.dtype) == ((20, 16, 16), np.uint8)
    assert np.array_equal(labels[:18], read_mask(tmp_path / "label.nii.gz").array)
    assert not labels[18:].any()

    network = build(find_model(str(folder / "tiny.toml")).networks["vae"]).eval()
    with safe_open(folder / "first" / "vae.safetensors", framework="pt") as file:
        network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
    hu = np.pad(read_image(tmp_path / "image.nii.gz").array, ((0, 2), (0, 0), (0, 0)), constant_values=-1000)
    with torch.no_grad():
        mean, _ = network.encode(torch.from_numpy(intensity(hu))[None, None])  # type: ignore[operator]
    assert np.allclose(latent, mean[0].numpy(), atol=2e-3, rtol=2e-3)
    before = found.latent.stat().st_mtime_ns
    encode(tmp_path, folder / "first" / "vae.safetensors", model=str(folder / "tiny.toml"), device="cpu")
    assert found.latent.stat().st_mtime_ns == before


def test_training_on_a_list_without_latents_names_the_command(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    with pytest.raises(UsageError, match="no latent") as caught:
        train(
            "dm",
            data=tmp_path / "data" / "list.json",
            out=tmp_path / "out",
            overrides=overrides(folder, "dm"),
        )
    assert "maisi data encode" in str(caught.value.hint)


def test_controlnet_needs_its_diffusion_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diffusion model's weights"):
        run(folder, "controlnet", tmp_path / "out", unet=None)
    assert not (tmp_path / "out").exists()


# --- losses -------------------------------------------------------------------------------


def test_losses_are_the_references(shared: Callable[[str], Path]) -> None:
    """Reconstruction and KL of the reference's first VAE training step."""
    at = shared("golden/t60_train_vae")
    arrays, first = (
        np.load(at / "arrays.npz"),
        json.loads((at / "case.json").read_text("utf-8"))["scalars"]["steps"][0],
    )
    image, made, mean, sigma = (torch.from_numpy(arrays[name]) for name in ("image_0", "reconstruction_0", "z_mu_0", "z_sigma_0"))
    assert float(losses.distance(made, image, "l1")) == pytest.approx(first["recons"], rel=1e-5)
    assert float(losses.kl_divergence(mean, sigma)) == pytest.approx(first["kl"], rel=1e-5)


def test_losses_have_their_closed_forms() -> None:
    a, b = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 4.0, 4.0])
    assert float(losses.distance(a, b, "l1")) == pytest.approx(1.0)
    assert float(losses.distance(a, b, "l2")) == pytest.approx(5 / 3)
    with pytest.raises(UsageError, match="l3"):
        losses.distance(a, b, "l3")
    standard = torch.zeros(2, 4, 2, 2, 2)
    assert float(losses.kl_divergence(standard, torch.ones_like(standard))) == pytest.approx(0, abs=1e-4)
    # one dimension with mean 3, sigma 2: (9 + 4 - log 4 - 1) / 2
    assert float(losses.kl_divergence(torch.full((1, 1), 3.0), torch.full((1, 1), 2.0))) == pytest.approx(6 - math.log(2))
    hu = torch.tensor([-1000.0, -200.0, 50.0, 300.0, 1000.0])
    assert losses.window((hu + 1000) / 2000).tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)


@given(st.floats(-2, 2), st.integers(0, 2))
def test_edges_ignore_an_offset_and_see_a_step(offset: float, axis: int) -> None:
    image = torch.rand(1, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert float(losses.edge_distance(image + offset, image)) == pytest.approx(0, abs=1e-6)
    n = image.shape[2 + axis]
    step = torch.zeros_like(image)
    step.narrow(2 + axis, n // 2, n - n // 2).fill_(1.0)
    # one of the n - 1 differences along one of three axes is 1
    assert float(losses.edge_distance(image + step, image)) == pytest.approx(1 / (n - 1) / 3, abs=1e-5)


# --- flow ---------------------------------------------------------------------------------


def test_time_is_the_references(shared: Callable[[str], Path]) -> None:
    """The time of the reference's first ControlNet step, drawn after that step's noise, on a 16^3 latent."""
    first = json.loads((shared("golden/t63_train_controlnet_rflow") / "case.json").read_text("utf-8"))["scalars"]["steps"][0]
    torch.manual_seed(0)
    torch.randn(1, 4, 16, 16, 16)
    assert draw_times(TrainSettings(kind="dm"), [16**3]).tolist() == pytest.approx(first["t"], rel=1e-5)


@given(st.integers(1, 80), st.integers(0, 1000), st.sampled_from(["uniform", "logit-normal"]))
def test_times_shift_with_size(side: int, seed: int, kind: str) -> None:
    settings = TrainSettings(kind="dm", timesteps=kind)
    doubled = TrainSettings(kind="dm", timesteps=kind, time_shift=2.0)
    torch.manual_seed(seed)
    unshifted = draw_times(settings, [32**3] * 8) / 1000
    torch.manual_seed(seed)
    times = draw_times(settings, [side**3] * 8) / 1000
    assert bool(((times >= 0) & (times <= 1)).all())
    odds, before = times / (1 - times), unshifted / (1 - unshifted)
    inner = (unshifted > 0.01) & (unshifted < 0.99)
    assert torch.allclose(odds[inner], before[inner] * side / 32, rtol=1e-3)  # the transform multiplies the odds by r
    torch.manual_seed(seed)
    later = draw_times(doubled, [side**3] * 8) / 1000
    assert torch.allclose(later[inner] / (1 - later[inner]), 2 * odds[inner], rtol=1e-2)


def test_times_are_spread_as_named() -> None:
    torch.manual_seed(0)
    uniform = draw_times(TrainSettings(kind="dm"), [32**3] * 20000) / 1000
    middle = draw_times(TrainSettings(kind="dm", timesteps="logit-normal"), [32**3] * 20000) / 1000
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert float(torch.logit(middle).std()) == pytest.approx(1, abs=0.02)
    assert float(middle.std()) < 0.75 * float(uniform.std())


def test_mixing_follows_a_straight_line() -> None:
    data, noise = torch.rand(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    mixed = mix(data, noise, torch.tensor([0.0, 250.0, 1000.0]))
    assert torch.equal(mixed[0], data[0])
    assert torch.equal(mixed[2], noise[2])
    assert torch.allclose(mixed[1], 0.75 * data[1] + 0.25 * noise[1])


def test_scale_factor_makes_unit_variance() -> None:
    rng = np.random.default_rng(0)
    latents = [rng.normal(2, 0.25, (4, n, 6, 5)).astype(np.float16) for n in (4, 9)]
    together = np.concatenate([each.astype(np.float64).ravel() for each in latents])
    assert scale_factor(latents) == pytest.approx(1 / together.std(), rel=1e-3)
    assert (together * scale_factor(latents)).std() == pytest.approx(1, rel=1e-3)


def diffusion_task(folder: Path, **changes: Any) -> DiffusionTask:
    return DiffusionTask(settings_from("dm", "nano-dm", overrides(folder, "dm", **changes)), folder / "data" / "latents.json")


def test_batches_keep_labels_on_their_latents(folder: Path) -> None:
    task = diffusion_task(folder, batch_size=3, whole_share=0.0, modality_dropout=0.0)
    task.cases = [dataclasses.replace(each, latent=each.latent.copy(), labels=each.labels.copy()) for each in task.cases]
    for each in task.cases:  # make the latent say where it was taken from, and the labels too
        where = np.indices(each.latent.shape[1:]).astype(np.float16)
        each.latent[:3], each.latent[3] = where, where[0]
        each.labels[...] = np.kron(where[0], np.ones((4, 4, 4))).astype(np.uint8)
    batch = task.batch(np.random.default_rng(0))
    assert batch["latent"].shape == (3, 4, 4, 4, 4)
    assert batch["labels"].shape == (3, 1, 16, 16, 16)
    rows = (batch["latent"][:, 3] / task.scale).round()
    assert torch.equal(rows, batch["labels"][:, 0, ::4, ::4, ::4].float())
    assert batch["class"].tolist() == [1, 1, 1]
    assert set(batch["voxels"].tolist()) <= {int(np.prod(each.latent.shape[1:])) for each in task.cases}
    hundredfold = {tuple(round(100 * s, 2) for s in each.spacing_mm) for each in task.cases}
    assert {tuple(round(float(s), 2) for s in row) for row in batch["spacing"]} <= hundredfold


def test_whole_volumes_and_dropped_modality(folder: Path) -> None:
    task = diffusion_task(folder, batch_size=2, whole_share=1.0, modality_dropout=1.0)
    batch = task.batch(np.random.default_rng(0))
    assert batch["latent"].shape[0] == 2
    assert tuple(batch["latent"].shape[1:]) in {each.latent.shape for each in task.cases}
    assert batch["class"].tolist() == [0, 0]


def test_perfect_velocity_has_no_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = diffusion_task(folder)
    batch = task.batch(np.random.default_rng(0))

    def exact(_self: Any, _network: nn.Module, x: Tensor, times: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        share = (times / 1000).view(-1, 1, 1, 1, 1)
        return (batch["latent"] - x) / share  # x = (1 - s) data + s noise, so data - noise = (data - x) / s

    monkeypatch.setattr(DiffusionTask, "predict", exact)
    loss, _ = task.loss(task.network, batch)
    assert float(loss) < 1e-6


def test_latents_must_match_their_labels(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    first = json.loads((tmp_path / "data" / "latents.json").read_text("utf-8"))["training"][0]
    np.save(tmp_path / "data" / first["label"], np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(UsageError, match="not 4 times"):
        DiffusionTask(settings_from("dm", "nano-dm", overrides(folder, "dm")), tmp_path / "data" / "latents.json")


def test_a_frozen_encoder_leaves_latents_as_they_are(folder: Path, tmp_path: Path) -> None:
    source = folder / "first" / "vae.safetensors"
    run(folder, "vae", tmp_path / "run", init=str(source), freeze_encoder=True, lr=1e-2)
    with safe_open(source, framework="pt") as old, safe_open(tmp_path / "run" / "vae.safetensors", framework="pt") as new:
        same = {key: torch.equal(old.get_tensor(key), new.get_tensor(key)) for key in old.keys()}  # noqa: SIM118
    assert all(equal for key, equal in same.items() if key.startswith(("encoder.", "quant_conv")))
    assert not all(same.values())


def test_noise_on_latents_has_at_most_the_share_asked_for_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = nn.Identity()
    noise_latents(layer, 0.2)
    latent = 3 * torch.randn(1, 4, 24, 24, 24)
    assert torch.equal(layer.eval()(latent), latent)
    layer.train()
    shares = [float((layer(latent) - latent).std() / latent.std()) for _ in range(40)]
    assert 0.12 < max(shares) < 0.205
    assert min(shares) < 0.08


# --- ControlNet ---------------------------------------------------------------------------


def controlnet_task(folder: Path, **changes: Any) -> ControlNetTask:
    settings = settings_from("controlnet", "nano-controlnet", overrides(folder, "controlnet", **changes))
    return ControlNetTask(settings, folder / "data" / "latents.json")


def test_controlnet_starts_as_the_diffusion_model(folder: Path) -> None:
    task = controlnet_task(folder)
    assert copy_matching(task.unet, task.network) > 20
    own, source = task.network.state_dict(), task.unet.state_dict()
    same = [key for key in own if key in source and own[key].shape == source[key].shape]
    assert all(torch.equal(own[key], source[key]) for key in same)
    batch = task.batch(np.random.default_rng(0))
    x, times = torch.randn(batch["latent"].shape), torch.tensor([400.0])
    with torch.no_grad():
        steered = task.predict(task.network.eval(), x, times, batch)
        alone = DiffusionTask.predict(task, task.unet, x, times, batch)
        assert torch.equal(alone, task.predict(task.network, x, times, {key: value for key, value in batch.items() if key != "labels"}))
    assert torch.allclose(steered, alone, atol=1e-6)  # its last layers are zero: no effect before training


def test_only_the_controlnet_learns(folder: Path) -> None:
    task = controlnet_task(folder)
    frozen = {key: value.clone() for key, value in task.unet.state_dict().items()}
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(task.network.parameters(), lr=1e-2)
    for _ in range(4):
        loss, _ = task.loss(task.network, task.batch(np.random.default_rng(0)))
        loss.backward()
        optimiser.step()
    assert all(torch.equal(value, frozen[key]) for key, value in task.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in task.unet.parameters())
    batch = task.batch(np.random.default_rng(0))
    x, times = torch.randn(batch["latent"].shape), torch.tensor([400.0])
    with torch.no_grad():
        made = task.predict(task.network.eval(), x, times, batch)
        other = task.predict(task.network, x, times, {**batch, "labels": torch.zeros_like(batch["labels"])})
    assert float((made - other).abs().max()) > 1e-4  # now the mask matters; before it did not at all


def test_residuals_are_added_to_copies_with_equal_numbers(folder: Path) -> None:
    task = controlnet_task(folder)
    torch.manual_seed(0)
    for parameter in task.controlnet.parameters():  # off the zeros that it starts with
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    batch = task.batch(np.random.default_rng(0))
    x, times = torch.randn(batch["latent"].shape), torch.tensor([400.0])
    with torch.no_grad():
        in_place = task.predict(task.network.eval(), x, times, batch)
        add_residuals_out_of_place(task.unet)
        made = task.predict(task.network, x, times, batch)
    assert torch.equal(made, in_place)


def test_the_diffusion_model_learns_along_where_asked(folder: Path, tmp_path: Path) -> None:
    source = folder / "third" / "unet.safetensors"
    before = source.read_bytes()
    weights = run(folder, "controlnet", tmp_path / "run", train_unet=True, label_dropout=0.0, lr=1e-2)
    assert weights.name == "controlnet.safetensors"
    assert source.read_bytes() == before
    spec = find_model(str(folder / "tiny.toml"))
    for part in ("controlnet", "unet"):
        with safe_open(tmp_path / "run" / f"{part}.safetensors", framework="pt") as file:
            assert file.metadata()["part"] == part
            build(spec.networks[part]).load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
    with safe_open(source, framework="pt") as old, safe_open(tmp_path / "run" / "unet.safetensors", framework="pt") as new:
        assert new.metadata()["scale_factor"] == old.metadata()["scale_factor"]
        assert not torch.equal(new.get_tensor("out.2.conv.weight"), old.get_tensor("out.2.conv.weight"))


def test_without_labels_the_controlnet_is_left_out(folder: Path) -> None:
    task = controlnet_task(folder, train_unet=True, label_dropout=1.0)
    batch = task.batch(np.random.default_rng(0))
    assert "labels" not in batch
    loss, _ = task.loss(task.network, batch)
    loss.backward()
    assert all(parameter.grad is None for parameter in task.controlnet.parameters())
    assert any(parameter.grad is not None for parameter in task.unet.parameters())


def test_controlnet_learns_one_batch_by_heart(folder: Path) -> None:
    task = controlnet_task(folder)
    batch = task.batch(np.random.default_rng(0))
    optimiser = torch.optim.Adam(task.network.parameters(), lr=5e-3)
    values = []
    for _ in range(60):
        torch.manual_seed(0)  # the same time and noise
        loss, _ = task.loss(task.network, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.9 * values[0]


def test_the_scale_comes_with_the_diffusion_model(folder: Path) -> None:
    with safe_open(folder / "third" / "unet.safetensors", framework="pt") as file:
        stored = float(file.metadata()["scale_factor"])
    assert controlnet_task(folder).scale == stored
    task = diffusion_task(folder, init=str(folder / "third" / "unet.safetensors"))
    assert task.scale == stored


def test_starting_weights_are_loaded_and_kept(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "start.safetensors"
    shutil.copy(folder / "second" / "unet.safetensors", source)
    before = source.read_bytes()
    task = diffusion_task(folder, init=str(source))
    with safe_open(source, framework="pt") as file:
        assert all(torch.equal(value, file.get_tensor(key).float()) for key, value in task.network.state_dict().items())
    run(folder, "dm", tmp_path / "run", steps=1, init=str(source))
    assert source.read_bytes() == before


def test_settings_of_a_run_are_frozen() -> None:
    settings = TrainSettings(kind="vae")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 1.0  # type: ignore[misc]
