"""The table of bounds: `data/quality_ct.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LABEL_KEYS = ("labels", "compat", "against", "gas", "together", "left", "right", "whole")


def parse_labels(entries: Iterable[int | str]) -> tuple[int, ...]:
    """Return label ids from numbers and inclusive ranges: `[1, "28-32"]`."""
    ids: list[int] = []
    for entry in entries:
        first, _, last = str(entry).partition("-")
        ids.extend(range(int(first), int(last or first) + 1))
    return tuple(ids)


@cache
def ct_table() -> dict[str, Any]:
    """Return `data/quality_ct.toml`, its label lists as tuples of ids."""
    data = tomllib.loads((files("maisi_cli") / "data" / "quality_ct.toml").read_text("utf-8"))
    rows = [row for part in data.values() for row in (part if isinstance(part, list) else [part]) if isinstance(row, dict)]
    for row in rows:
        for key in _LABEL_KEYS:
            if isinstance(row.get(key), list):
                row[key] = parse_labels(row[key])
        if "when" in row:
            row["when"] = tuple(parse_labels(each) for each in row["when"])
    return data


def membership(labels: Iterable[int]) -> NDArray[np.bool_]:
    """Return a look-up table of 256 entries that is True for these labels."""
    table = np.zeros(256, dtype=bool)
    table[list(labels)] = True
    return table
