"""A list cut down to a few cases: a network that cannot learn these by heart will not learn more of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError


@contextmanager
def only(data: Path, count: int | None, *, held_out: int = 0) -> Iterator[Path]:
    """Give data, a list or a folder of lists, with the first `count` training cases alone, for as long as the block runs.

    Validation looks at the same cases. None gives the data as they are. Raises `UsageError` for fewer cases than `count`.
    """
    if count is None:
        yield data
        return
    lists = sorted(data.glob("*.json")) if data.is_dir() else [data]
    with tempfile.TemporaryDirectory(prefix="maisi-overfit-") as name:
        for path in lists:
            content = _content(path)
            if content is not None:
                (Path(name) / path.name).write_text(json.dumps(_cut(content, count, held_out, path)), "utf-8")
        yield Path(name) if data.is_dir() else Path(name) / data.name


def _content(path: Path) -> dict[str, Any] | None:
    """Return what a list holds; None for what is no list, which whoever reads it will refuse."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    rows = content.get("training") if isinstance(content, dict) else None
    return content if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None


def _cut(content: dict[str, Any], count: int, held_out: int, path: Path) -> dict[str, Any]:
    numbered = list(enumerate(content["training"]))
    rows = [{"id": f"case{number:04d}", **row} for number, row in numbered if row.get("fold", 1) != held_out]
    if len(rows) < count:
        raise UsageError(f"{path} has {len(rows)} training cases, not {count}", hint=f"use --overfit {len(rows)}, or fewer")
    folder = path.absolute().parent

    def absolute(value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) and value and (folder / value).is_file() else value

    chosen = [{key: absolute(value) for key, value in row.items()} for row in rows[:count]]
    again = [{**row, "id": f"{row['id']} again", "fold": held_out} for row in chosen]
    return {**content, "training": [*chosen, *again]}
