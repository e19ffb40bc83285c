"""What the shell prints: data on stdout, everything else on stderr; a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..events import Event, Note, OnEvent, Saved, Stage, Step

LINE_EVERY_S = 10.0
"""How often a stage reports its steps where there is no terminal."""


class _Mode:
    """How much is said in this process; set once by the flags -q and -v."""

    quiet = False
    verbose = False


def set_mode(*, quiet: bool = False, verbose: bool = False) -> None:
    """Choose how much goes to stderr: with `quiet` only errors, with `verbose` also saved files and details."""
    _Mode.quiet, _Mode.verbose = quiet, verbose


def data(text: str) -> None:
    """Print one line of the answer on stdout."""
    print(text, flush=True)  # noqa: T201


def say(text: str) -> None:
    """Print one line about the work on stderr, unless -q."""
    if not _Mode.quiet:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def warn(text: str) -> None:
    """Print one warning line on stderr, unless -q."""
    say(f"warning: {text}")


def fail(message: str, hint: str | None = None) -> None:
    """Print an error, and the way out below it, on stderr."""
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"  {hint}", file=sys.stderr, flush=True)  # noqa: T201


def json_out(payload: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout; lists of documents are one per line."""
    data(json.dumps(payload, ensure_ascii=False, allow_nan=False))


def on_terminal(stream: Any = None) -> bool:
    """Say whether a stream (stdout) is a terminal that may be drawn on."""
    stream = sys.stdout if stream is None else stream
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[str] = ()) -> None:
    """Print rows: aligned plain text where stdout is piped, a table that fits the window on a terminal.

    The columns named in `right` are aligned to the right.
    """
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if on_terminal():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in texts:
            drawn.add_row(*(_escaped(cell) for cell in row))
        Console(highlight=False).print(drawn)
        return
    widths = [max(len(column), *(len(row[k]) for row in texts)) if texts else len(column) for k, column in enumerate(columns)]
    for row in [list(columns), *texts]:
        cells = [cell.rjust(width) if name in right else cell.ljust(width) for cell, width, name in zip(row, widths, columns, strict=True)]
        data("  ".join(cells).rstrip())


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def events() -> Iterator[OnEvent]:
    """Give a listener that shows the engine's events on stderr: a live bar on a terminal, plain lines elsewhere."""
    if _Mode.quiet:
        yield _Silent()
    elif on_terminal(sys.stderr):
        with _live() as listener:
            yield listener
    else:
        yield _Lines()


class _Silent:
    def __call__(self, event: Event) -> None:
        """Say nothing (-q)."""


class _Lines:
    """Plain lines: stages as they begin, steps at most every ten seconds, notes and warnings at once."""

    def __init__(self) -> None:
        self.shown = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            self.shown = time.monotonic()
            say(_stage_text(event))
        elif isinstance(event, Step):
            if time.monotonic() - self.shown >= LINE_EVERY_S or event.done == event.total:
                self.shown = time.monotonic()
                say(f"  {event.stage} {event.done}/{event.total}{_figures(event)}")
        else:
            _say_rest(event, say)


@contextmanager
def _live() -> Iterator[OnEvent]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def line(text: str) -> None:
            progress.console.print(text, markup=False, soft_wrap=True)

        def show(event: Event) -> None:
            if isinstance(event, Stage):
                for task in tasks.values():
                    progress.remove_task(task)
                tasks.clear()
                tasks[event.name] = progress.add_task(_stage_text(event), total=None, figures="")
            elif isinstance(event, Step):
                if event.stage not in tasks:
                    tasks[event.stage] = progress.add_task(event.stage, total=event.total, figures="")
                progress.update(tasks[event.stage], completed=event.done, total=event.total, figures=_figures(event))
            else:
                _say_rest(event, line)

        yield show


def _stage_text(event: Stage) -> str:
    where = f"sample {event.sample}: " if event.sample is not None else ""
    return f"{where}{event.name}" + (f" ({event.detail})" if event.detail else "")


def _figures(event: Step) -> str:
    return "".join(f"  {name} {value:.4g}" for name, value in (event.values or {}).items())


def _say_rest(event: Event, line: Callable[[str], None]) -> None:
    if isinstance(event, Note):
        line(f"{'warning: ' if event.level == 'warning' else ''}{event.text}")
    elif isinstance(event, Saved) and _Mode.verbose:
        line(f"wrote {event.path}")
