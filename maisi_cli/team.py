"""Several processes that share one piece of work, as torchrun and accelerate start them; alone, a team of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from .errors import CannotRun

_PATIENCE = timedelta(hours=48)  # one process may have hours of volumes more than another


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """This process's number and that of all; objects are exchanged over gloo, so that no GPU is needed for it."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order, on each of them. Raises `CannotRun` when another process failed."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            raise CannotRun(f"process {self.rank} lost another one, which has failed", hint="its own error stands above") from error
        return found

    def share(self, value: Any) -> Any:
        """Return the value of the first process, on all of them."""
        return self.gather(value)[0]

    def device(self, named: Callable[[str], torch.device], wanted: str = "auto") -> torch.device:
        """Return the device of this process: with several GPUs the one of its local rank."""
        found = named(wanted)
        if found.type == "cuda" and found.index is None and self.size > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return found


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """Give the team of this process: that of its launcher's environment, or itself alone."""
    size = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if size < 2 and not (distributed.is_available() and distributed.is_initialized()):
        yield Team()
        return
    started = not distributed.is_initialized()
    if started:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    group = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Team(rank=distributed.get_rank(), size=distributed.get_world_size(), group=group)
    finally:
        if started:
            with contextlib.suppress(Exception):
                distributed.destroy_process_group()
