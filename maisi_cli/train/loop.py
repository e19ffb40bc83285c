"""The one training loop: steps, learning rate, averaging, validation, checkpoints that can be resumed exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import MaisiError, UsageError
from ..events import Note, OnEvent, Saved, Stage, Step, Stopped
from ..files import refuse_overwriting, write_atomic
from ..weights import save_state
from .settings import TrainSettings

STATE = "state.pt"
LOG = "log.jsonl"
_SPOILED_AT_MOST = 5
_STATE_KEYS = ("schema", "settings", "step", "elapsed_s", "model", "average", "optimiser", "numpy_rng", "torch_rng", "best")


class Task(Protocol):
    """What is trained: a network, batches for it, its loss and its validation."""

    name: str
    network: nn.Module

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that are written; the one that the training is about comes first."""

    def to(self, device: torch.device) -> None:
        """Move frozen helpers to the device."""

    def batch(self, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Draw one batch; all randomness of the data comes from `rng`."""

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss to minimise and figures to log; randomness comes from torch's generator."""

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return figures on held-out data with fixed noise; `score` is the one to minimise."""

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of `network` by part: what goes into `<part>.safetensors`."""

    def metadata(self, part: str) -> dict[str, str]:
        """Return what to store beside the exported weights of a part."""


def run(task: Task, settings: TrainSettings, out: Path, *, resume: str | None, force: bool, on_event: OnEvent) -> Path:
    """Train until the settings' end; returns the exported safetensors of the averaged weights, best by validation.

    `out` gets `state.pt` (everything that resuming needs), `log.jsonl` and `<part>.safetensors` of each part. Two runs of N and M
    steps, the second resumed, give bit-equal weights to one of N + M on a CPU. SIGTERM and Ctrl-C save the state first.
    Raises `UsageError` when `resume` finds parts missing or other settings, and `MaisiError` when the loss
    is not finite, or the gradient several times in a row.
    """
    accelerator = Accelerator(mixed_precision=settings.precision, cpu=_device(settings) == "cpu")
    device = accelerator.device
    state_file = _state_file(out, task.parts, resume, force=force)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    network = task.network.to(device)
    task.to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99))
    prepared, optimiser = accelerator.prepare(network, optimiser)
    average = {key: value.detach().clone() for key, value in network.state_dict().items()}
    step, before_s, best, spoiled = 0, 0.0, math.inf, 0
    if state_file is not None:
        step, before_s, best = _restore(state_file, settings, network, average, optimiser, rng)
        on_event(Note(text=f"resumed {task.name} at step {step} from {state_file}"))
    on_event(Stage(name=f"train {task.name}", detail=f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters on {device}"))
    started = time.monotonic()
    weights = _weights(out, task.parts)

    def save() -> None:
        content = {
            "schema": "maisi.train/1", "settings": _fingerprint(settings), "step": step, "elapsed_s": before_s + time.monotonic() - started,
            "model": network.state_dict(), "average": average, "optimiser": optimiser.state_dict(),
            "numpy_rng": json.dumps(rng.bit_generator.state), "torch_rng": torch.get_rng_state(), "best": best,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomic(out / STATE, buffer.getvalue())

    with _stopping() as stop:
        while True:
            elapsed = before_s + time.monotonic() - started
            progress = max(step / settings.steps, elapsed / 60 / settings.max_minutes if settings.max_minutes else 0.0)
            if progress >= 1 or stop:
                break
            rate = _rate(settings, step, progress)
            for group in optimiser.param_groups:
                group["lr"] = rate
            network.train()
            batch = {key: value.to(device) for key, value in task.batch(rng).items()}
            with accelerator.autocast():
                loss, figures = task.loss(prepared, batch)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(network.parameters(), settings.clip_norm)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise MaisiError(f"the loss of {task.name} is {value} at step {step}", hint=f"lower train.lr and resume from {out / STATE}")
            if norm is not None and not math.isfinite(float(norm)):
                # seen with bf16 on processors, with a loss as usual: such a gradient would spoil all weights
                spoiled += 1
                if spoiled >= _SPOILED_AT_MOST:
                    raise MaisiError(f"the gradient of {task.name} is not finite, {spoiled} steps in a row, at step {step}",
                                     hint=f"resume from {out / STATE} with a smaller train.lr")  # fmt: skip
                on_event(Note(text=f"left out a batch at step {step}: its gradient is not finite", level="warning"))
                optimiser.zero_grad(set_to_none=True)
                continue
            spoiled = 0
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            _average(average, network, min(settings.ema_decay, (1 + step) / (10 + step)))
            shown = {"loss": value, **{key: float(each) for key, each in figures.items()}}
            _log(out, {"step": step, "seconds": round(elapsed, 1), "lr": rate, "norm": float(norm) if norm is not None else 0.0, **shown})
            on_event(Step(stage=f"train {task.name}", done=step, total=settings.steps, values=shown))
            if step % settings.validate_every == 0:
                best = _validate(task, network, average, out, step, best, on_event)
            if step % settings.save_every == 0:
                save()
    save()  # first: whoever stops a run may not wait for its validation
    best = _validate(task, network, average, out, step, best, on_event)
    save()
    if stop:
        on_event(Stopped(text=f"stopped at step {step}; continue with --resume auto", level="warning"))
    for path in weights:
        on_event(Saved(path=path, kind="weights"))
    return weights[0]


def _device(settings: TrainSettings) -> str:
    from ..networks import device_named

    return device_named(settings.device).type


def _rate(settings: TrainSettings, step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * warm * (settings.final_lr + (1 - settings.final_lr) * cosine)


def _average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1 - decay)
            else:
                average[key].copy_(value)


def _validate(task: Task, network: nn.Module, average: dict[str, Tensor], out: Path, step: int, best: float, on_event: OnEvent) -> float:
    """Validate the averaged weights with torch's generator untouched, and export them when they are the best so far."""
    kept = {key: value.detach().clone() for key, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    network.load_state_dict(average)
    network.eval()
    with torch.no_grad():
        figures = task.validate(network)
    network.load_state_dict(kept)
    torch.set_rng_state(random_state)
    _log(out, {"step": step, **{f"val_{key}": value for key, value in figures.items()}})
    on_event(Note(text=f"{task.name} step {step}: " + ", ".join(f"{key} {value:.5g}" for key, value in figures.items())))
    if figures["score"] < best or not all(path.exists() for path in _weights(out, task.parts)):
        for part, tensors in task.exports(average).items():
            metadata = {"step": str(step), "score": f"{figures['score']:.6g}", **task.metadata(part)}
            save_state(out / f"{part}.safetensors", tensors, metadata=metadata)
        return figures["score"]
    return best


def _weights(out: Path, parts: Sequence[str]) -> list[Path]:
    return [out / f"{part}.safetensors" for part in parts]


def _state_file(out: Path, parts: Sequence[str], resume: str | None, *, force: bool) -> Path | None:
    state, weights = out / STATE, _weights(out, parts)
    if resume is None:
        for old in (state, *weights):
            refuse_overwriting(old, force=force)
        for old in (state, *weights, out / LOG):
            old.unlink(missing_ok=True)
        return None
    if resume == "auto":
        return state if state.exists() else None
    path = Path(resume)
    if not path.is_file():
        raise UsageError(f"there is no training state {resume}", hint="use --resume auto, or the path of a state.pt")
    return path


def _restore(
    path: Path, settings: TrainSettings, network: nn.Module, average: dict[str, Tensor], optimiser: Any, rng: np.random.Generator
) -> tuple[int, float, float]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is not a training state: {(str(error).splitlines() or ['damaged'])[0]}",
                         hint="start again without --resume") from error  # fmt: skip
    missing = [key for key in _STATE_KEYS if key not in state]
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}, so it cannot be resumed exactly", hint="start again without --resume")
    if state["settings"] != _fingerprint(settings):
        raise UsageError(f"{path} was trained with other settings", hint="use the same preset and --set values, or start again")
    network.load_state_dict(state["model"])
    for key, value in state["average"].items():
        average[key].copy_(value)
    optimiser.load_state_dict(state["optimiser"])
    rng.bit_generator.state = json.loads(state["numpy_rng"])
    torch.set_rng_state(state["torch_rng"])
    return int(state["step"]), float(state["elapsed_s"]), float(state["best"])


def _fingerprint(settings: TrainSettings) -> str:
    """Return a hash of what must not change on resuming; the run's length and its bookkeeping may."""
    free = {"steps", "max_minutes", "save_every", "keep_last", "device"}
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key not in free}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _log(out: Path, row: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT inside the block instead of dying; the list is empty until one arrives."""
    got: list[int] = []
    before: dict[int, Any] = {}
    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        try:
            before[number] = signal.signal(number, lambda received, _frame: got.append(received))
        except ValueError:  # not the main thread: its owner handles signals
            continue
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
