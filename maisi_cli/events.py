"""What the engine says while it works: it never prints, it calls `on_event` with one of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the work begins, such as `denoise`, for sample `sample` when there are several."""

    name: str
    detail: str = ""
    sample: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """`done` of `total` steps of the stage named `stage` are finished; `values` are figures worth showing."""

    stage: str
    done: int
    total: int
    values: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that the user should know: a choice that was made, a retry, a warning."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Note):
    """Work was stopped from outside before its end, and can be continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A file was written and is complete."""

    path: Path
    kind: str


Event = Stage | Step | Note | Saved
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing with an event: the default listener."""
