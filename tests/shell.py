"""What a command line gave, as the tests of the shell look at it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from maisi_cli import cli


@dataclass(frozen=True)
class Done:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout, which is one line."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The JSON objects on stdout, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def paths(self) -> list[Path]:
        """The paths on stdout, one a line."""
        return [Path(line) for line in self.out.splitlines()]

    @property
    def first_column(self) -> list[str]:
        """The first cell of each row of a table, without its header."""
        return [line.strip().split("  ")[0] for line in self.out.splitlines()[1:]]

    def cells(self, header: str) -> list[list[str]]:
        """Return the rows of the table that begins with a column `header`, split where columns begin."""
        lines = self.out.splitlines()
        first = next(k for k, line in enumerate(lines) if line.split("  ")[0].strip() == header)
        rows = []
        for line in lines[first + 1 :]:
            if not line.strip():
                break
            rows.append([cell.strip() for cell in line.strip().split("  ") if cell.strip()])
        return rows


def qc_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Return a function that runs `maisi qc` with a line of arguments, and sees to it that no traceback is shown."""

    def run(line: str) -> Done:
        code = cli.run(["qc", *shlex.split(line)])
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return Done(code, text.out, text.err)

    return run
