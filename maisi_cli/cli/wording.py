"""How commands word what they show: facts, verdicts, triples, yes and no."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from . import output


def facts(rows: Sequence[tuple[str, object]]) -> None:
    """Print names and values, one pair a line."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        output.data(f"{name:{width}}  {value}".rstrip())


def verdict(passed: bool, what: str, findings: Iterable[object]) -> None:
    """Print `pass` or `FAIL` with what was checked, and one line for each finding."""
    output.data(f"{'pass' if passed else 'FAIL'}  {what}")
    for finding in findings:
        output.data(f"      {finding}")


def triple(values: Sequence[float] | None, digits: int = 4) -> str:
    """Return three numbers as one token, rounded to `digits`; nothing for None."""
    from ..geometry import format_triple

    return "" if values is None else format_triple(round(value, digits) for value in values)


def number(value: float | None) -> str:
    """Return a number without trailing zeros; nothing for None."""
    return "" if value is None else f"{value:g}"


def yes(value: object) -> str:
    """Return `yes` or `no`."""
    return "yes" if value else "no"


def words(values: Iterable[object]) -> str:
    """Return values joined by commas."""
    return ", ".join(map(str, values))


def toml(value: Any) -> str:
    """Return a TOML value of text, numbers, truth values and lists of them (JSON writes these alike)."""
    return json.dumps(value, ensure_ascii=False)
