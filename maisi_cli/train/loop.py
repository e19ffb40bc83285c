"""The one training loop: steps, averaging, validation and checkpoints, in one process or in several."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import MaisiError, UsageError
from ..events import Note, OnEvent, Saved, Stage, Step, Stopped, ignore
from ..fast_training import pays, trainable
from ..files import hold
from ..team import Team
from ..weights import save_state
from .distributed import SharedNoise, accelerated, part_of, whole
from .optimisation import average_into, learning_rate, optimiser_for
from .previews import save_previews
from .recompute import recompute
from .settings import TrainSettings
from .state import Identity, Learner, refuse_losing, restore, save, starting_point
from .tracking import Since, Trackers, check_trackers

_SPOILED_AT_MOST = 5
_SPOILED_WITH_SCALER = 40  # a scaler of fp16 begins far too high, and halves until gradients fit


class Task(Protocol):
    """What is trained: a network, batches for it, its loss and its validation.

    A task may have more: `preview(network)` returns named volumes (x, y, z) made with fixed seeds from the averaged weights;
    `data_hashes` tells by name what is trained on, so that a run does not go on with other data; `opponent` is a second network
    with an optimiser of its own, `opponent_name` its file, and `opponent_loss(opponent, batch)` returns its loss and figures
    right after each step of the network, on the same batch. A batch may name its cases in `ids`; `notes` are said
    when training begins.
    """

    name: str
    network: nn.Module

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that are written; the one that the training is about comes first."""

    def to(self, device: torch.device) -> None:
        """Move frozen helpers to the device."""

    def batch(self, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Draw one batch, that of all processes together; all randomness of the data comes from `rng`."""

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss to minimise, a mean over the batch, and figures to log; randomness comes from torch's generator."""

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return figures on held-out data with fixed noise; `score` is the one to minimise."""

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of `network` by part: what goes into `<part>.safetensors`."""

    def metadata(self, part: str) -> dict[str, str]:
        """Return what to store beside the exported weights of a part."""


def run(
    task: Task, settings: TrainSettings, out: Path, *, resume: str | None, force: bool, on_event: OnEvent,
    data_hashes: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Train until the settings' end; returns the exported safetensors of the averaged weights, best by validation.

    `out` gets `checkpoints/` (everything that resuming needs), `log.jsonl` and `<part>.safetensors` of each part. Two runs of N
    and M steps, the second resumed, give bit-equal weights to one of N + M on a CPU. SIGTERM, SIGUSR1 and Ctrl-C save the state
    first. Raises `UsageError` when `resume` finds a part missing, damaged or of another run, and `MaisiError` when loss or
    gradient are not finite: several times in a row, or once where `on_nan` is `stop`.
    """
    written = _weights(out, task)
    check_trackers(settings.trackers)
    refuse_losing({"init": settings.init, "unet": settings.unet, "vae": settings.vae}, written, out)
    with (
        accelerated(settings) as (accelerator, ranks),
        hold(out, busy=f"another process trains in {out}") if ranks.rank == 0 else nullcontext(),
    ):
        checkpoint = ranks.share(starting_point(out, written, resume, force=force) if ranks.rank == 0 else None)
        torch.manual_seed(settings.seed)
        learner, prepared, opponent = _prepared(task, settings, accelerator)
        identity = Identity.of(settings, {**(data_hashes or {}), **getattr(task, "data_hashes", {})}, ranks.size)
        say = on_event if ranks.rank == 0 else ignore
        for text in getattr(task, "notes", ()):
            say(Note(text=text))
        if checkpoint is not None:
            restore(checkpoint, learner, identity, ranks)
            _check_best(learner, checkpoint, written, say)
            say(Note(text=f"resumed {task.name} at step {learner.step} from {checkpoint}"))
        trackers = Trackers(settings.trackers, out, Since(step=learner.step, validated=learner.validated)) if ranks.rank == 0 else None
        try:
            training = _Training(
                task=task, settings=settings, out=out, accelerator=accelerator, ranks=ranks, learner=learner, identity=identity,
                prepared=prepared, opponent=opponent, trackers=trackers, say=say, before_s=learner.elapsed_s,
            )  # fmt: skip
            training.go()
        finally:
            if trackers is not None:
                trackers.close()
        for path in written:
            say(Saved(path=path, kind="weights"))
    return written[0]


def _prepared(task: Task, settings: TrainSettings, accelerator: Accelerator) -> tuple[Learner, nn.Module, nn.Module | None]:
    """Return what learns, and its networks as they are called in training: wrapped for several processes, or compiled."""
    device = accelerator.device
    network = task.network.to(device)
    task.to(device)
    for module in {id(each): each for each in (network, *vars(task).values()) if isinstance(each, nn.Module)}.values():
        if settings.fast and pays(module, device):
            trainable(module)
        if settings.recompute:
            recompute(module)
    optimiser = optimiser_for(settings, network.parameters(), device)
    prepared, optimiser = accelerator.prepare(network, optimiser)
    if accelerator.is_fsdp2:  # sharded in place, and called in other ways than `forward` as well
        network = prepared
        for name in ("encode", "decode"):
            if hasattr(network, name):
                torch.distributed.fsdp.register_fsdp_forward_method(network, name)
    opponent = opponent_called = opponent_optimiser = None
    if getattr(task, "opponent", None) is not None:
        opponent = task.opponent.to(device)  # type: ignore[attr-defined]
        rate = getattr(settings, "adversarial_lr", settings.lr)
        opponent_called, opponent_optimiser = accelerator.prepare(opponent, optimiser_for(settings, opponent.parameters(), device, lr=rate))
    learner = Learner(
        network=network, average={key: value.detach().clone() for key, value in network.state_dict().items()}, optimiser=optimiser,
        rng=np.random.default_rng(settings.seed), scaler=accelerator.scaler, opponent=opponent, opponent_optimiser=opponent_optimiser,
    )  # fmt: skip
    return learner, prepared, opponent_called


def _check_best(learner: Learner, checkpoint: Path, written: Sequence[Path], say: OnEvent) -> None:
    """Refuse to go on without the best weights that the checkpoint speaks of; in another folder they are found anew."""
    lacking = [path for path in written if not path.exists()]
    if not lacking or math.isinf(learner.best):
        return
    if checkpoint.absolute().parent.parent == written[0].absolute().parent:
        raise UsageError(f"{checkpoint} cannot be resumed: the best weights {lacking[0]} are missing",
                         hint="bring the file back, or resume into another --out")  # fmt: skip
    say(Note(text=f"the best weights so far stay beside {checkpoint.parent}; from here on they are found anew", level="warning"))
    learner.best = math.inf


@dataclass(slots=True, kw_only=True)
class _Training:
    """A run that is under way."""

    task: Task
    settings: TrainSettings
    out: Path
    accelerator: Accelerator
    ranks: Team
    learner: Learner
    identity: Identity
    prepared: nn.Module
    opponent: nn.Module | None
    trackers: Trackers | None
    say: OnEvent
    before_s: float
    started: float = field(default_factory=time.monotonic)

    def go(self) -> None:
        """Train to the end, or until a signal arrives."""
        task, settings, learner = self.task, self.settings, self.learner
        millions = sum(parameter.numel() for parameter in learner.network.parameters()) / 1e6
        several = f", {self.ranks.size} processes" if self.ranks.size > 1 else ""
        self.say(Stage(name=f"train {task.name}", detail=f"{millions:.2f} M parameters on {self.accelerator.device}{several}"))
        with _stopping() as signals:
            self.save()  # a run that cannot write says so now, and one that is killed has where to go on from
            while True:
                stop, learner.elapsed_s = self._agree(bool(signals))
                limit = learner.elapsed_s / 60 / settings.max_minutes if settings.max_minutes else 0.0
                progress = max(learner.step / settings.steps, limit)
                if progress >= 1 or stop:
                    break
                if not self._step(progress):
                    continue
                if learner.step % settings.validate_every == 0:
                    self.validate()
                if settings.preview_every and learner.step % settings.preview_every == 0:
                    self.preview()
                if learner.step % settings.save_every == 0:
                    self.save()
            self.save()  # first: whoever stops a run may not wait for its validation
            if learner.validated != learner.step:
                self.validate()
                self.save()
        if stop:
            self.say(Stopped(text=f"stopped at step {learner.step}; continue with --resume auto", level="warning"))

    def save(self) -> None:
        """Write a checkpoint."""
        save(self.out, self.learner, self.identity, self.ranks, keep_last=self.settings.keep_last)

    def _agree(self, stop: bool) -> tuple[bool, float]:
        """Return, the same in all processes, whether one of them was told to stop, and the seconds of the first."""
        told = self.ranks.gather((stop, self.before_s + time.monotonic() - self.started))
        return any(each for each, _ in told), told[0][1]

    def _step(self, progress: float) -> bool:
        """Take one step; return False for one that was left out, because loss or gradient were not finite."""
        task, settings, learner, accelerator = self.task, self.settings, self.learner, self.accelerator
        rate = learning_rate(settings, learner.step, progress)
        _set_rate(learner.optimiser, rate)
        learner.network.train()
        figures: dict[str, float] = {}
        ids: list[str] = []
        for micro in range(settings.accumulate):
            batch, noise = self._draw(ids)
            together = contextlib.nullcontext() if micro + 1 == settings.accumulate else accelerator.no_sync(self.prepared)
            with together:
                with noise, accelerator.autocast():
                    loss, parts = task.loss(self.prepared, batch)
                accelerator.backward(loss / settings.accumulate)
            _add(figures, {"loss": loss, **parts}, settings.accumulate)
        if learner.opponent is not None:
            learner.opponent_optimiser.zero_grad(set_to_none=True)  # what the network's own loss left there is not its to learn
        norm = accelerator.clip_grad_norm_(learner.network.parameters(), settings.clip_norm)
        size = float(whole(norm)) if norm is not None else 0.0
        figures = self._mean(figures)
        if not (math.isfinite(figures["loss"]) and math.isfinite(size)):
            self._leave_out(figures["loss"], ids)
            return False
        learner.spoiled = 0
        learner.optimiser.step()
        learner.optimiser.zero_grad(set_to_none=True)
        if self.opponent is not None:
            figures |= self._step_opponent(batch, noise, rate)
        learner.step += 1
        average_into(learner.average, learner.network, min(settings.ema_decay, (1 + learner.step) / (10 + learner.step)))
        self._log({"seconds": round(learner.elapsed_s, 1), "lr": rate, "norm": size, **figures})
        self.say(Step(stage=f"train {task.name}", done=learner.step, total=settings.steps, values=figures))
        return True

    def _draw(self, ids: list[str]) -> tuple[dict[str, Any], contextlib.AbstractContextManager[Any]]:
        """Return this process's part of the next batch on the device, and the context in which its noise is drawn."""
        drawn = self.task.batch(self.learner.rng)
        self.learner.draws += 1
        ids.extend(str(each) for each in drawn.get("ids", ()))
        mine, count = part_of(drawn, self.ranks)
        device = self.accelerator.device
        batch = {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in mine.items()}
        everyone = next(len(value) for value in drawn.values() if isinstance(value, Tensor))
        return batch, SharedNoise(self.ranks, count, everyone) if everyone > count else contextlib.nullcontext()

    def _step_opponent(self, batch: Mapping[str, Any], noise: contextlib.AbstractContextManager[Any], rate: float) -> dict[str, float]:
        """Let the second network take its step on the same batch; one whose gradient is not finite is left out."""
        learner, settings, accelerator = self.learner, self.settings, self.accelerator
        assert learner.opponent is not None
        _set_rate(learner.opponent_optimiser, rate / settings.lr * (settings.adversarial_lr or settings.lr))
        learner.opponent.train()
        with noise, accelerator.autocast():
            loss, parts = self.task.opponent_loss(self.opponent, batch)  # type: ignore[attr-defined]
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(learner.opponent.parameters(), settings.clip_norm)
        if math.isfinite(float(whole(norm))) or learner.scaler is not None:  # a scaler leaves the step out itself
            learner.opponent_optimiser.step()
        else:
            self.say(Note(text=f"left out a step of the opponent at step {learner.step}: its gradient is not finite", level="warning"))
        learner.opponent_optimiser.zero_grad(set_to_none=True)
        figures: dict[str, float] = {}
        _add(figures, {"opponent_loss": loss, **parts}, 1)
        return self._mean(figures)

    def _leave_out(self, loss: float, ids: Sequence[str]) -> None:
        """Forget a step that would spoil all weights, and say so; after several in a row, or with `on_nan` = `stop`, give up."""
        learner, settings = self.learner, self.settings
        what = f"its loss is {loss}" if not math.isfinite(loss) else "its gradient is not finite"
        cases = f" (cases {', '.join(ids)})" if ids else ""
        learner.spoiled += 1
        scaled = learner.scaler is not None and math.isfinite(loss)
        if learner.scaler is not None:
            learner.optimiser.step()  # leaves the weights as they are, and lowers the scale
        learner.optimiser.zero_grad(set_to_none=True)
        hint = f"the last checkpoint in {self.out} is whole; see that data, or start from it with --init and a smaller train.lr"
        if settings.on_nan == "stop" and not scaled:
            raise MaisiError(f"{self.task.name} stopped at step {learner.step}{cases}: {what}", hint=hint)
        if learner.spoiled >= (_SPOILED_WITH_SCALER if scaled else _SPOILED_AT_MOST):
            raise MaisiError(
                f"{self.task.name} left out {learner.spoiled} batches in a row at step {learner.step}{cases}: {what}", hint=hint
            )
        if not scaled:
            self.say(Note(text=f"left out a batch at step {learner.step}{cases}: {what}", level="warning"))

    def _mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return the means over all processes."""
        told = self.ranks.gather(dict(figures))
        return {key: math.fsum(each[key] for each in told) / len(told) for key in figures}

    def _log(self, figures: Mapping[str, float]) -> None:
        if self.trackers is not None:
            self.trackers.log(self.learner.step, figures)

    def validate(self) -> None:
        """Validate the averaged weights, and export them when they are the best so far."""
        task, learner = self.task, self.learner
        with _averaged(learner):
            figures: dict[str, float] = self.ranks.share(dict(task.validate(learner.network)))
        learner.validated = learner.step
        self._log({f"val_{key}": value for key, value in figures.items()})
        self.say(Note(text=f"{task.name} step {learner.step}: " + ", ".join(f"{key} {value:.5g}" for key, value in figures.items())))
        missing = self.ranks.share(not all(path.exists() for path in _weights(self.out, task)))
        if figures["score"] < learner.best or missing:
            self._export(figures["score"])
            learner.best = figures["score"]

    def _export(self, score: float) -> None:
        task, learner = self.task, self.learner
        files = {
            part: (tensors, task.metadata(part))
            for part, tensors in task.exports({k: whole(v) for k, v in learner.average.items()}).items()
        }
        if learner.opponent is not None:
            name = _opponent_name(task)
            files[name] = ({key: whole(value) for key, value in learner.opponent.state_dict().items()}, {"part": name})
        for part, (tensors, metadata) in files.items() if self.ranks.rank == 0 else ():
            about = {"step": str(learner.step), "score": f"{score:.6g}", **metadata}
            save_state(self.out / f"{part}.safetensors", tensors, metadata=about)
        self.ranks.share(None)

    def preview(self) -> None:
        """Write a picture of what the averaged weights make, where the task can."""
        make = getattr(self.task, "preview", None)
        if make is None:
            return
        with _averaged(self.learner):
            volumes = make(self.learner.network)
        if self.ranks.rank == 0:
            self.say(Saved(path=save_previews(volumes, self.out, self.learner.step), kind="preview"))


@contextmanager
def _averaged(learner: Learner) -> Iterator[None]:
    """Let the network hold its averaged weights inside the block, without gradients, and leave all generators as they were."""
    network = learner.network
    kept = {key: value.detach().clone() for key, value in network.state_dict().items()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        network.load_state_dict(learner.average)
        network.eval()
        try:
            yield
        finally:
            network.load_state_dict(kept)


def _add(figures: dict[str, float], found: Mapping[str, float | Tensor], times: int) -> None:
    for key, value in found.items():
        figures[key] = figures.get(key, 0.0) + float(value.detach() if isinstance(value, Tensor) else value) / times


def _set_rate(optimiser: Any, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _opponent_name(task: Task) -> str:
    return str(getattr(task, "opponent_name", "opponent"))


def _weights(out: Path, task: Task) -> list[Path]:
    opponent = [_opponent_name(task)] if getattr(task, "opponent", None) is not None else []
    return [out / f"{part}.safetensors" for part in (*task.parts, *opponent)]


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 (of a batch system) and Ctrl-C inside the block instead of dying; empty until one arrives."""
    got: list[int] = []
    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
            before[int(number)] = signal.signal(number, lambda received, _frame: got.append(received))
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
