"""Starting one training in several processes of this machine, and answering for them all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import CannotRun, MaisiError, UsageError
from ..events import Event, OnEvent, ignore

LOST = "lost another one"  # as `Team` says it: the error of a process that only saw another one fail
_GRACE_S = 20.0

Work = Callable[..., Path]
Outcome = tuple[str, Any]
"""`("done", path)`, `("failed", error)` or `("bug", traceback)`."""


def processes() -> int:
    """Return how many processes a launcher (torchrun, accelerate, `launch`) has started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def is_first() -> bool:
    """Say whether this process writes for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def processes_wanted(gpus: int | str, device: str) -> int:
    """Return the number of processes for `auto` (one for each GPU) or a number; without CUDA they run on the processor."""
    if processes() > 1:
        raise UsageError("this process was started by a launcher, with others", hint="leave out --gpus, or the launcher")
    if gpus != "auto" and not (str(gpus).isdigit() and int(gpus) > 0):
        raise UsageError(f"--gpus {gpus} is no number of GPUs", hint="use auto, or a number from 1")
    if gpus in (1, "1"):
        return 1
    import torch

    here = torch.cuda.device_count() if device == "auto" or device.startswith("cuda") else 0
    if gpus == "auto":
        return max(1, here)
    if here and int(gpus) > here:
        raise CannotRun(f"this machine has {here} GPUs, not {gpus}", hint=f"use --gpus {here}, or --set device=cpu")
    return int(gpus)


def launch(work: Work, count: int, arguments: Mapping[str, Any], on_event: OnEvent) -> Path:
    """Call `work(**arguments, on_event=...)` in `count` processes that are one team; return what the first returns.

    Its events are passed on. SIGTERM and Ctrl-C are passed to all of them, which save and end. The error of a process is raised
    here; those that lose it are ended.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes: dict[Connection, int] = {}
    team: list[Any] = []
    try:
        with _passing_on(team) as told:
            for rank in range(count):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(rank, count, port, work, dict(arguments), there), daemon=True)
                process.start()
                there.close()
                pipes[here] = rank
                team.append(process)
            outcomes = _listen(pipes, team, on_event)
    finally:
        _end(team)
    return _answer(outcomes, count, stopped=bool(told))


def _listen(pipes: dict[Connection, int], team: list[Any], on_event: OnEvent) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    until = None
    while pipes and (until is None or time.monotonic() < until):
        for pipe in wait(list(pipes), timeout=0.2):
            assert isinstance(pipe, Connection)
            try:
                kind, content = pipe.recv()  # of processes that were started here
            except (EOFError, OSError):
                rank = pipes.pop(pipe)
                if rank not in outcomes:
                    team[rank].join(_GRACE_S)
                    outcomes[rank] = ("died", team[rank].exitcode)
                continue
            if kind == "event":
                on_event(content)
            else:
                outcomes[pipes[pipe]] = (kind, content)
        if until is None and any(kind != "done" for kind, _ in outcomes.values()):
            until = time.monotonic() + _GRACE_S
    return outcomes


def _answer(outcomes: Mapping[int, Outcome], count: int, *, stopped: bool) -> Path:
    """Return the first process's path, or raise the error that explains the failure best."""
    failed = [(rank, kind, content) for rank, (kind, content) in sorted(outcomes.items()) if kind != "done"]
    own = [row for row in failed if not (row[1] == "failed" and LOST in row[2].message)]
    for rank, kind, content in own or failed:
        if kind == "failed":
            raise content
        if kind == "bug":
            raise RuntimeError(f"process {rank} of {count}: {content}")
        if stopped:
            raise KeyboardInterrupt
        raise CannotRun(f"process {rank} of {count} ended with {content}", hint="memory may have run out: use a smaller batch or crop")
    return Path(outcomes[0][1])


def _work(rank: int, count: int, port: int, work: Work, arguments: dict[str, Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everyone; the parent passes it on once
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))

    def tell(event: Event) -> None:
        pipe.send(("event", event))

    outcome: Outcome
    try:
        outcome = ("done", work(**arguments, on_event=ignore if rank else tell))
    except MaisiError as error:
        outcome = ("failed", error)
    except Exception as error:
        outcome = ("bug", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    with contextlib.suppress(OSError):
        pipe.send(outcome)


@contextlib.contextmanager
def _passing_on(team: list[Any]) -> Iterator[list[int]]:
    """Pass SIGTERM and Ctrl-C on to the processes inside the block; the list tells which arrived."""
    got: list[int] = []
    before: dict[int, Any] = {}

    def pass_on(received: int, _frame: Any) -> None:
        got.append(received)
        for process in team:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    for number in (int(signal.SIGTERM), int(signal.SIGINT)):
        with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
            before[number] = signal.signal(number, pass_on)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(team: list[Any]) -> None:
    """Wait a little for processes that are done, and end those that hang on one that failed."""
    until = time.monotonic() + 2.0
    for process in team:
        process.join(max(0.0, until - time.monotonic()))
    for process in team:
        if process.is_alive():
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
