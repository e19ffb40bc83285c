"""Where the figures of a run go: `log.jsonl` always, and what plugins register as trackers (hook `register_trackers`).

A tracker is opened by a function `open(out, since) -> Tracker`: `out` is the run's folder, `since` says which figures are known
already; what a tracker holds beyond them belongs to a run that was cut off, and is dropped. What a tracker lacks, its function
`check()`, where it has one, says before a run begins.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import CannotRun
from ..files import write_atomic
from ..plugins import plugins

LOG = "log.jsonl"
CSV = "log.csv"
BOARD = "tensorboard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """Where training goes on: after which step, and the step that was validated last; -1 for none."""

    step: int = 0
    validated: int = -1

    def knows(self, step: float, name: str) -> bool:
        """Say whether a figure of a step is older than this."""
        return step <= (self.validated if name.startswith("val_") else self.step)


class Tracker(Protocol):
    """Takes the figures of a run."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; those of validation begin with `val_`."""

    def close(self) -> None:
        """Write what is not written yet."""


class JsonLines:
    """`log.jsonl`: a JSON object a line, `{"step": 3, "loss": 0.2, ...}`."""

    def __init__(self, out: Path, since: Since) -> None:
        self.path = out / LOG
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_text("utf-8").splitlines() if _is_known(line, since)]
            write_atomic(self.path, "".join(f"{line}\n" for line in kept).encode())

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")

    def close(self) -> None:
        """Every line is written already."""


def _is_known(line: str, since: Since) -> bool:
    """Say whether to keep a line; one that was cut off while it was written is not kept."""
    try:
        row = json.loads(line)
        return all(since.knows(float(row["step"]), name) for name in row if name != "step")
    except (ValueError, KeyError, TypeError):
        return False


class CsvTable:
    """`log.csv`: a row for each figure, `step,name,value`."""

    def __init__(self, out: Path, since: Since) -> None:
        self.path = out / CSV
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(("step", "name", "value"))
        if self.path.exists() and since.step:
            with self.path.open(newline="", encoding="utf-8") as file:
                writer.writerows(row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and since.knows(int(row[0]), row[1]))
        write_atomic(self.path, buffer.getvalue().encode())

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a row for each figure."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((step, name, repr(float(value))) for name, value in figures.items())

    def close(self) -> None:
        """Every row is written already."""


class Board:
    """TensorBoard's event files, under `tensorboard/`."""

    def __init__(self, out: Path, since: Since) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(out / BOARD), purge_step=since.step + 1)

    @staticmethod
    def check() -> None:
        """Raise `CannotRun` where the package is not installed."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise CannotRun(
                "the tracker tensorboard needs a package that is not installed", hint='pip install "maisi[tensorboard]"'
            ) from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a scalar for each figure: `train/loss`, `validation/score`."""
        for name, value in figures.items():
            validation = name.startswith("val_")
            self.writer.add_scalar(f"validation/{name.removeprefix('val_')}" if validation else f"train/{name}", value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise for a name that no plugin registers, and for a tracker that cannot be opened here."""
    for name in names:
        check = getattr(plugins().registry("trackers").get(name), "check", None)
        if check is not None:
            check()


class Trackers:
    """`log.jsonl` and the trackers of a run, as one."""

    def __init__(self, names: Sequence[str], out: Path, since: Since) -> None:
        registry = plugins().registry("trackers")
        self.all: list[Tracker] = [JsonLines(out, since), *(registry.get(name)(out, since) for name in names)]

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell them all."""
        for each in self.all:
            each.log(step, figures)

    def close(self) -> None:
        """Close them all."""
        for each in self.all:
            each.close()
