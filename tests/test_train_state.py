"""Checkpoints of training: whole or absent whenever a run is killed, and refused by name when a part is gone or of another run."""

from __future__ import annotations

import hashlib
import json
import math
import os
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
from maisi_cli.errors import CannotRun, MaisiError, UsageError
from maisi_cli.events import Event, Note, Step, Stopped, ignore
from maisi_cli.files import hold
from maisi_cli.geometry import Geometry
from maisi_cli.plugins import plugins
from maisi_cli.team import Team
from maisi_cli.train import loop, tracking
from maisi_cli.train.optimisation import average_into, optimiser_for
from maisi_cli.train.settings import TrainSettings
from maisi_cli.train.state import Identity, Learner, restore, save
from maisi_cli.volumes import Mask, Volume
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Toy:
    """A regression of eight numbers with a second network, quick enough to be killed a hundred times."""

    name = "toy"
    parts = ("toy", "twin")
    opponent_name = "judge"

    def __init__(self, settings: TrainSettings, *, noise: float = 0.1, spoil: Callable[[int], bool] = lambda _count: False) -> None:
        torch.manual_seed(settings.seed)
        self.network: nn.Module = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        self.opponent: nn.Module | None = nn.Linear(1, 1)
        self.settings, self.noise, self.spoil, self.count = settings, noise, spoil, 0
        self.data_hashes = {"toys": "1"}
        self.previewed: list[float] = []

    def to(self, device: torch.device) -> None:
        pass

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        numbers = rng.integers(100, size=self.settings.batch_size)
        x = np.stack([np.random.default_rng(int(number)).normal(size=8) for number in numbers]).astype(np.float32)
        return {"x": torch.from_numpy(x), "ids": [f"case{number}" for number in numbers]}

    def loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        x = batch["x"]
        self.made = network(x + self.noise * torch.randn_like(x))
        self.count += 1
        loss = (self.made - x[:, :1] * x[:, 1:2]).square().mean()
        return loss * (math.nan if self.spoil(self.count) else 1), {"twice": 2 * loss}

    def opponent_loss(self, opponent: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        loss = (opponent(self.made.detach()) - 1).square().mean()
        return loss, {"judged": loss}

    def validate(self, network: nn.Module) -> dict[str, float]:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        return {"score": float((network(x) - x[:, :1] * x[:, 1:2]).square().mean())}

    def preview(self, network: nn.Module) -> dict[str, Any]:
        self.previewed.append(float(torch.rand(())))  # leaves no trace
        level = float(network(torch.ones(1, 8)))
        ramp = np.linspace(-1000, 1000, 8 * 9 * 10, dtype=np.float32).reshape(8, 9, 10) + np.float32(level)
        grid = Geometry(size=(8, 9, 10), spacing=(1.0, 2.0, 3.0))
        return {"a ramp": Volume(array=ramp, geometry=grid), "labels": Mask(array=np.ones((8, 9, 10), np.uint8), geometry=grid)}

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"toy": dict(tensors), "twin": dict(tensors)}

    def metadata(self, part: str) -> dict[str, str]:
        return {"part": part}


def settings_of(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"kind": "vae", "steps": 4, "lr": 1e-2, "warmup_steps": 1, "batch_size": 2, "validate_every": 3, "save_every": 2,
                            "ema_decay": 0.5, "device": "cpu", **changes})  # fmt: skip


def train(out: Path, *, task: Toy | None = None, resume: str | None = None, force: bool = False,
          on_event: Callable[[Event], None] = ignore, data: Mapping[str, str] | None = None, **changes: Any) -> Path:  # fmt: skip
    settings = settings_of(**changes)
    return loop.run(
        task or Toy(settings), settings, out, resume=resume, force=force, on_event=on_event, data_hashes=data or {"list": "abc"}
    )


def latest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step_*"))[-1]


def tensors(out: Path) -> dict[str, Tensor]:
    return {f"{path.stem} {key}": value for path in sorted(latest(out).glob("*.safetensors")) for key, value in load_file(path).items()}


def rows(out: Path, *leave_out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in leave_out} for row in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digest(out: Path) -> str:
    """Return a hash of everything that a run makes: all tensors, the exported weights, the log but for its clock."""
    found = hashlib.sha256()
    for name, value in tensors(out).items():
        found.update(name.encode() + value.numpy().tobytes())
    for name in ("toy", "twin", "judge"):
        for key, value in sorted(load_file(out / f"{name}.safetensors").items()):
            found.update(key.encode() + value.numpy().tobytes())
    found.update(json.dumps(rows(out, "seconds")).encode())
    found.update("".join(line for line in (out / "log.csv").read_text().splitlines() if "seconds" not in line).encode())
    return found.hexdigest()


# --- killed -----------------------------------------------------------------------------------------

DRIVER = """
import json, os, runpy, shutil, signal, sys
from pathlib import Path
here = runpy.run_path(sys.argv[1])
root = Path(sys.argv[2])
how = dict(trackers=("csv",), resume="auto", steps=3, validate_every=2)

def killed(out, at):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") and str(out) in str(arguments[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    here["train"](out, **how)

here["train"](root / "0", **how)  # everything is imported before the first fork
results = [[0, True, here["digest"](root / "0"), []]]
for at in range(1, 10000):
    out = root / str(at)
    number = os.fork()
    if number == 0:
        killed(out, at)
        os._exit(0)
    status = os.waitpid(number, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, (at, status)
    here["train"](out, **how)
    results.append([at, os.WIFSIGNALED(status), here["digest"](out), sorted(path.name for path in out.rglob(".*"))])
    shutil.rmtree(out)
    if status == 0:
        break
print(json.dumps(results))
"""


def test_a_run_killed_before_any_operation_on_its_files_goes_on_bit_equal(tmp_path: Path) -> None:
    """SIGKILL at the k-th file operation (open, rename, remove, mkdir), for every k; each time `--resume auto` ends the same."""
    train(tmp_path / "whole", trackers=("csv",), steps=3, validate_every=2)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, __file__, str(tmp_path / "runs")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert sum(was_killed for _, was_killed, _, _ in results) > 80
    assert {found for _, _, found, _ in results} == {digest(tmp_path / "whole")}
    assert [left for *_, left in results if left] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, number: int) -> None:
    said: list[Event] = []

    def listen(event: Event) -> None:
        said.append(event)
        if isinstance(event, Step) and event.done == 1:
            os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: None)  # were it not handled, it would end the tests
    try:
        train(tmp_path / "run", on_event=listen)
    finally:
        signal.signal(number, before)
    assert latest(tmp_path / "run").name == "step_00000001"
    assert [event for event in said if isinstance(event, Stopped)]
    train(tmp_path / "run", resume="auto", trackers=("csv",))
    train(tmp_path / "whole", trackers=("csv",))
    one, two = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- refused ----------------------------------------------------------------------------------------

FILES = ("model", "average", "optimiser", "opponent", "opponent_optimiser", "rng")
KEYS = ("schema", "kind", "settings", "data", "processes", "step", "draws", "spoiled", "elapsed_s", "best", "validated", "optimisers",
        "scaler", "numpy_rng", "files", "sha256")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    train(out)
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def refused(out: Path, message: str, **changes: Any) -> None:
    """Assert that a run does not go on, says why in one line, and changes nothing."""
    before = contents(out)
    with pytest.raises(UsageError, match=message) as caught:
        train(out, resume="auto", **{"steps": 6, **changes})
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert contents(out) == before


def test_these_are_all_parts(made: Path) -> None:
    assert {path.name for path in latest(made).iterdir()} == {"state.json", *(f"{name}.safetensors" for name in FILES)}
    assert set(json.loads((latest(made) / "state.json").read_text())) == set(KEYS)
    assert {key.split("/")[-1] for key in load_file(latest(made) / "optimiser.safetensors")} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_damaged_is_named(run: Path, name: str) -> None:
    path = latest(run) / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(run, f"{name}.safetensors is damaged")
    path.unlink()
    refused(run, f"{name}.safetensors is missing")


@pytest.mark.parametrize("key", KEYS)
def test_a_part_that_is_missing_or_changed_in_the_state_is_named(run: Path, key: str) -> None:
    path = latest(run) / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
    refused(run, f"state.json lacks {key}")
    path.write_text(json.dumps({**content, key: "other"}))
    refused(run, "schema is 'other'" if key == "schema" else "state.json was changed")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_a_state_that_is_no_json_is_named(run: Path, content: bytes) -> None:
    (latest(run) / "state.json").write_bytes(content)
    refused(run, "state.json is damaged")


def test_a_state_that_is_gone_is_named(run: Path) -> None:
    (latest(run) / "state.json").unlink()
    refused(run, "state.json is missing")


@pytest.mark.parametrize("name", ["toy", "twin", "judge"])
def test_best_weights_that_are_gone_are_named(run: Path, name: str) -> None:
    (run / f"{name}.safetensors").unlink()
    refused(run, f"best weights .*{name}.safetensors are missing")


def test_two_processes_never_train_in_one_folder(run: Path, tmp_path: Path) -> None:
    with hold(run, busy="busy"):
        before = contents(run)
        with pytest.raises(CannotRun, match=f"another process trains in {run}"):
            train(run, resume="auto", steps=6)
        assert contents(run) == before
    train(run, resume="auto", steps=6)
    with hold(tmp_path / "new" / "run", busy="busy"):
        pass
    assert not (tmp_path / "new").exists()  # nothing came of it


@pytest.mark.parametrize("left", ["toy.safetensors", "log.jsonl"])
def test_a_run_without_its_checkpoints_is_not_begun_again(run: Path, left: str) -> None:
    for path in list(run.iterdir()):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(run, f"{left} is there, but .*checkpoints is not")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 2e-2}, "train.lr was 0.01, is 0.02"),
     ({"batch_size": 3, "accumulate": 2}, "train.accumulate was 1, is 2; train.batch_size was 2, is 3"),
     ({"data": {"list": "abd"}}, "the list is another"), ({"data": {"list": "abc", "vae": "0"}}, "the vae is another"),
     ({"kind": "dm"}, "it is of train vae")],
)  # fmt: skip
def test_other_settings_and_data_are_named(run: Path, changes: dict[str, Any], message: str) -> None:
    refused(run, message, **changes)


def test_other_starting_weights_are_named(tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    start.write_bytes(b"one")
    train(tmp_path / "run", init=str(start))
    moved = start.rename(tmp_path / "moved.safetensors")  # where it lies does not matter
    train(tmp_path / "run", resume="auto", init=str(moved))
    moved.write_bytes(b"two")
    refused(tmp_path / "run", "the init is another", init=str(moved))


def test_another_number_of_processes_is_named(run: Path) -> None:
    content = json.loads((latest(run) / "state.json").read_text())
    two = Identity.of(settings_of(), {"list": "abc", "toys": "1"}, 2)
    assert two.differences(content) == ["processes were 1, are 2 (--gpus)"]


def test_how_long_and_how_often_may_change(run: Path) -> None:
    train(run, resume="auto", steps=6, save_every=1, validate_every=1, keep_last=2, on_nan="stop", preview_every=1)
    assert latest(run).name == "step_00000006"


# --- where a run starts -----------------------------------------------------------------------------


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, save_every=1, keep_last=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000003", "step_00000004"]


def test_an_earlier_checkpoint_can_be_gone_on_from(tmp_path: Path) -> None:
    train(tmp_path / "run", save_every=1, keep_last=9)
    whole = tensors(tmp_path / "run")
    early = tmp_path / "run" / "checkpoints" / "step_00000002"
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match="step_00000004 is later than step_00000002 and would be lost"):
        train(tmp_path / "run", resume=str(early))
    assert contents(tmp_path / "run") == before
    said: list[Event] = []
    train(tmp_path / "other", resume=str(early / "state.json"), on_event=said.append)
    assert all(torch.equal(value, whole[key]) for key, value in tensors(tmp_path / "other").items())
    assert contents(tmp_path / "run") == before
    train(tmp_path / "run", resume=str(early), force=True)
    assert all(torch.equal(value, whole[key]) for key, value in tensors(tmp_path / "run").items())
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["init", "unet", "vae"])
@pytest.mark.parametrize(
    "file", ["toy.safetensors", "twin.safetensors", "judge.safetensors", "checkpoints/step_00000004/average.safetensors"]
)
def test_starting_weights_are_never_written(run: Path, name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    before = contents(run)
    with pytest.raises(UsageError, match=f"would overwrite --{name} {file}"):
        train(run, force=True, **{name: file})
    assert contents(run) == before


def test_a_link_to_starting_weights_is_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run / "toy.safetensors")
    with pytest.raises(UsageError, match="would overwrite --init"):
        train(run, force=True, init=str(tmp_path / "link"))


def test_a_disk_that_is_full_leaves_the_last_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    before = contents(run / "checkpoints")
    monkeypatch.setattr("maisi_cli.train.state._flush", full)
    with pytest.raises(CannotRun, match="No space left"):
        train(run, resume="auto", steps=6)
    assert contents(run / "checkpoints").keys() == before.keys()
    monkeypatch.undo()
    train(run, resume="auto", steps=6)


def test_the_scaler_of_fp16_is_part_of_the_state(tmp_path: Path) -> None:
    def learner(scale: float | None) -> Learner:
        torch.manual_seed(0)
        network = nn.Linear(2, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        optimiser = optimiser_for(settings_of(), network.parameters(), torch.device("cpu"))
        return Learner(
            network=network, average=dict(network.state_dict()), optimiser=optimiser, rng=np.random.default_rng(0), scaler=scaler
        )

    identity = Identity.of(settings_of(), {}, 1)
    one, two = learner(64.0), learner(2.0)
    one.scaler.scale(torch.ones(1))
    save(tmp_path, one, identity, Team(), keep_last=1)
    restore(latest(tmp_path), two, identity, Team())
    two.scaler.scale(torch.ones(1))
    assert two.scaler.get_scale() == 64
    with pytest.raises(UsageError, match="scaler"):
        restore(latest(tmp_path), learner(None), identity, Team())


def test_a_network_that_is_sharded_is_saved_whole_and_comes_back_sharded(tmp_path: Path) -> None:
    """FSDP 2, in a group of one process on the processor: the tensors are sharded ones, and a step after the restart is the same."""

    def learner() -> Learner:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        fully_shard(network, mesh=distributed.init_device_mesh("cpu", (1,)))
        average = {key: value.detach().clone() for key, value in network.state_dict().items()}
        optimiser = optimiser_for(settings_of(), network.parameters(), torch.device("cpu"))
        return Learner(network=network, average=average, optimiser=optimiser, rng=np.random.default_rng(0))

    def step(each: Learner) -> None:
        each.network(torch.ones(2, 4)).square().mean().backward()
        each.optimiser.step()
        each.optimiser.zero_grad()
        average_into(each.average, each.network, 0.5)

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        identity = Identity.of(settings_of(), {}, 1)
        one, two = learner(), learner()
        step(one)
        save(tmp_path, one, identity, Team(), keep_last=1)
        restore(latest(tmp_path), two, identity, Team())
        for each in (one, two):
            step(each)
        for tables in ((one.network.state_dict(), two.network.state_dict()), (one.average, two.average)):
            for key, value in tables[0].items():
                assert isinstance(value, DTensor)
                assert isinstance(tables[1][key], DTensor)
                assert torch.equal(value.full_tensor(), tables[1][key].full_tensor())
    finally:
        distributed.destroy_process_group()


# --- steps ------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_larger_batch(tmp_path: Path) -> None:
    """Without noise the gradient of four batches of two is that of one batch of eight, to rounding."""
    for name, changes in (("many", {"batch_size": 2, "accumulate": 4}), ("one", {"batch_size": 8})):
        settings = settings_of(clip_norm=1e6, **changes)
        task = Toy(settings, noise=0.0)
        task.opponent = None
        train(tmp_path / name, task=task, clip_norm=1e6, **changes)
    many, one = tensors(tmp_path / "many"), tensors(tmp_path / "one")
    assert all(torch.allclose(value, one[key], rtol=1e-4, atol=1e-6) for key, value in many.items() if key.startswith(("model", "average")))
    for a, b in zip(rows(tmp_path / "many"), rows(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=0.2)  # the clock is in it
        assert a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), rel=1e-5)


def test_the_opponent_steps_after_the_network_and_is_exported(tmp_path: Path) -> None:
    train(tmp_path, steps=30, lr=5e-2)
    judged = [row["judged"] for row in rows(tmp_path) if "judged" in row]
    assert judged[-1] < 0.8 * judged[0]
    assert set(load_file(tmp_path / "judge.safetensors")) == {"weight", "bias"}


def test_a_spoiled_batch_is_left_out_with_the_names_of_its_cases(tmp_path: Path) -> None:
    said: list[Event] = []
    settings = settings_of()
    train(tmp_path, task=Toy(settings, spoil=(2).__eq__), on_event=said.append)
    notes = [event.text for event in said if isinstance(event, Note) and "left out" in event.text]
    (note,) = notes
    drawn = np.random.default_rng(0)
    drawn.integers(100, size=2)
    expected = ", ".join(f"case{number}" for number in drawn.integers(100, size=2))
    assert note == f"left out a batch at step 1 (cases {expected}): its loss is nan"
    assert all(bool(value.isfinite().all()) for key, value in tensors(tmp_path).items() if not key.startswith("rng"))


def test_a_spoiled_batch_stops_the_run_where_asked_and_the_last_checkpoint_is_good(tmp_path: Path) -> None:
    with pytest.raises(MaisiError, match=r"toy stopped at step 3 \(cases case\d+, case\d+\): its loss is nan") as caught:
        train(tmp_path, task=Toy(settings_of(), spoil=(4).__eq__), on_nan="stop")
    assert caught.value.exit_code == 1
    assert latest(tmp_path).name == "step_00000002"
    train(tmp_path, resume="auto")


# --- trackers and previews --------------------------------------------------------------------------


def test_previews_are_pictures_that_change_nothing(tmp_path: Path) -> None:
    task = Toy(settings_of())
    train(tmp_path / "with", task=task, preview_every=2)
    train(tmp_path / "without")
    names = [path.name for path in sorted((tmp_path / "with" / "previews").iterdir())]
    assert names == ["step_00000002.png", "step_00000004.png"]
    with Image.open(tmp_path / "with" / "previews" / names[0]) as picture:
        assert picture.format == "PNG"
        assert picture.width <= 768
        assert len(set(picture.convert("L").tobytes())) > 50
    assert len(task.previewed) == 2
    a, b = tensors(tmp_path / "with"), tensors(tmp_path / "without")
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_figures_go_to_every_tracker(tmp_path: Path) -> None:
    train(tmp_path, trackers=("csv", "tensorboard"))
    table = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert table[0] == ["step", "name", "value"]
    for row in rows(tmp_path):
        for name, value in row.items():
            assert name == "step" or [str(row["step"]), name, repr(float(value))] in table
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx([row["loss"] for row in rows(tmp_path) if "loss" in row])
    assert [event.step for event in board.Scalars("validation/score")] == [3, 4]


def test_a_tracker_whose_package_is_missing_names_it_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(CannotRun, match="tracker tensorboard needs") as caught:
        train(tmp_path / "run", trackers=("csv", "tensorboard"))
    assert caught.value.hint == 'pip install "maisi[tensorboard]"'
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="no tracker named 'tensorbord'"):
        train(tmp_path / "run", trackers=("tensorbord",))
    assert not (tmp_path / "run").exists()


def test_a_plugin_adds_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Mine:
        def __init__(self, out: Path, since: tracking.Since) -> None:
            told.append((out, since.step))

        def log(self, step: int, figures: Mapping[str, float]) -> None:
            told.append(step)

        def close(self) -> None:
            told.append("closed")

    registry = plugins().registry("trackers")
    registry.add("mine", Mine, owner="a test")
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    try:
        train(tmp_path, trackers=("mine",), validate_every=9)
    finally:
        registry.discard("mine")
    assert told == [(tmp_path, 0), 1, 2, 3, 4, 4, "closed"]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    tracking.JsonLines(tmp_path, tracking.Since(step=2)).log(3, {"loss": 0.5})
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 0.5}]
