"""Training in several processes: the same data, noise and losses as in one with the batch of them all; launching and its errors."""

from __future__ import annotations

import json
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
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.events import Event, Note, Stage, Step, Stopped
from maisi_cli.team import Team
from maisi_cli.testing import tiny_model
from maisi_cli.train import launcher, train
from maisi_cli.train.distributed import SharedNoise, accelerated, part_of
from maisi_cli.train.settings import TrainSettings
from safetensors.torch import load_file
from torch import Tensor

# float32 sums of two halves, added in another order
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and four random latents with their labels."""
    root = tmp_path_factory.mktemp("distributed")
    tiny_model(root)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        np.save(root / f"{number}.npy", rng.normal(size=(4, 8, 8, 8)).astype(np.float16))
        np.save(root / f"{number}_label.npy", rng.integers(1, 5, size=(32, 32, 32)).astype(np.uint8))
        files = {"latent": f"{number}.npy", "label": f"{number}_label.npy"}
        rows.append({"id": f"case{number}", **files, "spacing": [8, 8, 8], "modality": "ct", "fold": 0 if number == 3 else 1})
    (root / "latents.json").write_text(json.dumps({"training": rows}))
    return root


def overrides(root: Path, **changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "model": str(root / "tiny.toml"), "steps": 8, "max_minutes": None, "device": "cpu", "warmup_steps": 2, "lr": 1e-3,
        "crops": ((4, 4, 4),), "whole_share": 0.0, "validate_every": 1000, "save_every": 1000, "precision": "no", "accumulate": 2,
    }  # fmt: skip
    return {**table, **changes}


def run(
    root: Path, out: Path, *, gpus: int | str = 1, resume: str | None = None,
    on_event: Callable[[Event], None] = lambda _event: None, **changes: Any,
) -> Path:  # fmt: skip
    table = overrides(root, **changes)
    return train("dm", data=root / "latents.json", out=out, overrides=table, gpus=gpus, resume=resume, on_event=on_event)


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def tensors(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(sorted((out / "checkpoints").glob("step_*"))[-1] / f"{name}.safetensors")


# --- parts of a batch and of its noise --------------------------------------------------------------


def pair(count: int = 3) -> list[SharedNoise]:
    return [SharedNoise(Team(rank=rank, size=2), count, 2 * count) for rank in (0, 1)]


DRAWS: dict[str, Callable[[int], Tensor]] = {
    "randn by numbers": lambda n: torch.randn(n, 4, 5),
    "randn by a shape": lambda n: torch.randn((n, 4, 5)),
    "randn by a size": lambda n: torch.randn(torch.zeros(n, 4).shape),
    "randn by name": lambda n: torch.randn(size=(n, 4), dtype=torch.float64),
    "rand": lambda n: torch.rand(n),
    "rand_like": lambda n: torch.rand_like(torch.zeros(n, 2)),
    "randn_like": lambda n: torch.randn_like(torch.zeros(n, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d)),
    "randint": lambda n: torch.randint(1000, (n, 2)),
    "randint with two bounds": lambda n: torch.randint(5, 1000, (n,)),
    "randint by name": lambda n: torch.randint(5, 1000, size=(n,)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_parts_of_noise_are_the_whole_and_leave_the_same_state(name: str) -> None:
    torch.manual_seed(5)
    whole, after = DRAWS[name](6), torch.get_rng_state()
    parts = []
    for mode in pair():
        torch.manual_seed(5)
        with mode:
            parts.append(DRAWS[name](3))
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(*parts)


def test_noise_of_another_shape_is_the_same_everywhere() -> None:
    for draw in (lambda: torch.rand(()), lambda: torch.randn(4, 3), lambda: torch.randn(0), lambda: torch.randn_like(torch.zeros(5)),
                 lambda: torch.randint(9, (7,)), lambda: torch.zeros(3) + torch.arange(3)):  # fmt: skip
        torch.manual_seed(1)
        alone = draw()
        for mode in pair():
            torch.manual_seed(1)
            with mode:
                assert torch.equal(draw(), alone)


def test_a_batch_is_divided_in_order_and_whole_where_it_does_not_divide() -> None:
    batch = {"x": torch.arange(6).view(6, 1), "ids": list("abcdef"), "scale": torch.tensor([1.0, 2.0]), "name": "six"}
    parts = [part_of(batch, Team(rank=rank, size=3)) for rank in range(3)]
    assert [count for _, count in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), batch["x"])
    assert [part["ids"] for part, _ in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert all(torch.equal(part["scale"], batch["scale"]) and part["name"] == "six" for part, _ in parts)
    odd, count = part_of(batch, Team(rank=1, size=4))
    assert (count, odd["ids"]) == (6, list("abcdef"))


# --- two processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A run of two processes that was stopped by SIGTERM after its first step, and went on."""
    out, events = tmp_path_factory.mktemp("two") / "run", list[Event]()

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run(folder, out, gpus=2, on_event=listen)
    run(folder, out, gpus=2, resume="auto", on_event=events.append)
    return out, events


def test_two_processes_train_as_one_with_twice_the_batch(folder: Path, two: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """Losses, gradient norms and weights of two gloo processes agree with those of one process, relative to `TOLERANCE`."""
    out, events = two
    run(folder, tmp_path / "one", batch_size=2)
    ours, theirs = ([row for row in rows(each) if "loss" in row] for each in (out, tmp_path / "one"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 9))
    for name in ("loss", "norm", "lr"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=TOLERANCE)
    assert rows(out)[-1]["val_score"] == pytest.approx(rows(tmp_path / "one")[-1]["val_score"], rel=TOLERANCE)
    assert len({row["loss"] for row in ours}) == 8
    for name in ("model", "average"):
        one = tensors(tmp_path / "one", name)
        for key, value in tensors(out, name).items():
            assert torch.allclose(value, one[key], rtol=1e-4, atol=5e-5), (name, key)
    assert [event.done for event in events if isinstance(event, Step)] == list(range(1, 9))
    assert ["2 processes" in event.detail for event in events if isinstance(event, Stage)] == [True, True]


def test_a_signal_stops_both_processes_at_one_step_with_the_state_saved(two: tuple[Path, list[Event]]) -> None:
    _, events = two
    (stopped,) = [event.text for event in events if isinstance(event, Stopped)]
    (resumed,) = [event.text for event in events if isinstance(event, Note) and event.text.startswith("resumed")]
    step = int(stopped.split("step ")[1].split(";")[0])
    assert 1 <= step < 8
    assert f"at step {step} from" in resumed


def test_the_state_of_every_process_is_kept_and_its_number_is_asked_for(folder: Path, two: tuple[Path, list[Event]]) -> None:
    out, _ = two
    states = tensors(out, "rng")
    assert {key for key in states if key.endswith("torch")} == {"0/torch", "1/torch"}
    assert torch.equal(states["0/torch"], states["1/torch"])  # all draw everything
    with pytest.raises(UsageError, match=r"processes were 2, are 1 \(--gpus\)"):
        run(folder, out, resume="auto", steps=9)


@pytest.mark.slow
def test_two_processes_that_were_stopped_go_on_bit_equal(folder: Path, two: tuple[Path, list[Event]], tmp_path: Path) -> None:
    run(folder, tmp_path / "whole", gpus=2)
    for name in ("model", "average", "optimiser", "rng"):
        whole = tensors(tmp_path / "whole", name)
        assert all(torch.equal(value, whole[key]) for key, value in tensors(two[0], name).items()), name


# --- launching --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_error_of_a_process_is_raised_here_once(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    content = json.loads((folder / "latents.json").read_text())
    del content["training"][1]["latent"]
    (tmp_path / "data" / "latents.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="case case1 has no latent") as caught:
        train("dm", data=tmp_path / "data", out=tmp_path / "out", overrides=overrides(folder), gpus=2)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


LOST = CannotRun("process 1 lost another one, which has failed")


@pytest.mark.parametrize(
    ("outcomes", "kind", "message"),
    [
        ({0: ("failed", LOST), 1: ("failed", UsageError("no"))}, UsageError, "^no$"),
        ({0: ("died", -9), 1: ("failed", LOST)}, CannotRun, "process 0 of 2 ended with -9"),
        ({0: ("done", "x"), 1: ("bug", "KeyError: 'a'")}, RuntimeError, "process 1 of 2: KeyError"),
        ({0: ("failed", LOST)}, CannotRun, "lost another one"),
    ],
)
def test_the_error_that_explains_most_is_told(outcomes: Mapping[int, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        launcher._answer(outcomes, 2, stopped=False)
    assert launcher._answer({0: ("done", "x"), 1: ("done", "x")}, 2, stopped=False) == Path("x")
    with pytest.raises(KeyboardInterrupt):
        launcher._answer({0: ("died", -15), 1: ("died", -15)}, 2, stopped=True)


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launcher.processes_wanted("auto", "auto") == 1
    assert launcher.processes_wanted("3", "auto") == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [launcher.processes_wanted(*asked) for asked in (("auto", "auto"), ("auto", "cpu"), (2, "cuda"), ("4", "cpu"))] == [2, 1, 2, 4]
    with pytest.raises(CannotRun, match="has 2 GPUs, not 3"):
        launcher.processes_wanted(3, "auto")
    for wrong in ("0", "two", "-1", 0):
        with pytest.raises(UsageError, match="no number of GPUs"):
            launcher.processes_wanted(wrong, "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="started by a launcher"):
        launcher.processes_wanted(2, "auto")


def test_fp16_needs_a_gpu_and_says_so() -> None:
    with pytest.raises(CannotRun, match="fp16 needs a GPU"), accelerated(TrainSettings(kind="dm", precision="fp16", device="cpu")):
        pass


def test_precision_may_change_from_run_to_run_of_one_process() -> None:
    for precision, name in (("bf16", "bf16"), ("no", "no"), ("fp32", "no")):
        with accelerated(TrainSettings(kind="dm", precision=precision, device="cpu")) as (accelerator, ranks):
            assert accelerator.mixed_precision == name
            assert ranks.size == 1


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers_and_the_flag_agree(
    launcher: tuple[str, ...], folder: Path, two: tuple[Path, list[Event]], tmp_path: Path
) -> None:  # fmt: skip
    words = ["train", "dm", "--data", str(folder / "latents.json"), "--out", str(tmp_path / "run")]
    for key, value in overrides(folder).items():
        if value is not None:
            words += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "-m", "maisi_cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "run" / "unet.safetensors")]  # the first process answers
    out, _ = two
    ours, theirs = ([row["loss"] for row in rows(each) if "loss" in row] for each in (tmp_path / "run", out))
    assert ours == pytest.approx(theirs, rel=1e-6)  # the preset's time limit is part of the rate's progress
