"""`labels.json`: what the numbers in the label maps of a folder mean, with names and colours.

One file serves every label map of its folder. It has the form of `maisi labels list --json`; where label maps are
numbered anew (`--compat reference` with anatomy) it holds their numbers, and the MAISI id of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .anatomy import Label, maisi
from .errors import UsageError
from .files import write_atomic

if TYPE_CHECKING:
    from .settings import GenerateSettings

NAME = "labels.json"
SCHEMA = "maisi.labels/1"
RENUMBERED = "reference"
"""The vocabulary of label maps that number what was asked for 1, 2, ..."""
_OTHER = "choose another --out: one labels.json speaks for all label maps of its folder"

Numbering = tuple[int, ...]
"""MAISI ids in the order in which a label map numbers them 1, 2, ...; empty where it holds MAISI ids."""


def row_of(label: Label) -> dict[str, Any]:
    """Return a label as JSON data."""
    return {**asdict(label), "regions": list(label.regions), "color": list(label.color)}


def asked_for(settings: GenerateSettings) -> Numbering:
    """Return the ids that are asked for by name: those of `anatomy_size` where there are any, else those of `anatomy`."""
    names = [text.partition("=")[0] for text in settings.anatomy_size] or list(settings.anatomy)
    return tuple(maisi().id(name) for name in names)


def numbering_of(settings: GenerateSettings) -> Numbering:
    """Return how the label maps of a run are numbered."""
    own = settings.mask_source == "file" or (settings.mask_source == "auto" and settings.mask is not None)
    return asked_for(settings) if settings.compat == "reference" and not own else ()


def document(numbering: Numbering = ()) -> dict[str, Any]:
    """Return the content of `labels.json`: every label of the vocabulary, or those of a numbering."""
    if not numbering:
        return {"schema": SCHEMA, "vocabulary": "maisi", "labels": [row_of(label) for label in maisi().labels]}
    numbers = {label: number for number, label in enumerate(numbering, start=1)}
    known = {label.id: label for label in maisi().labels}
    rows = [{**row_of(replace(known[label], id=number, raw=None, host=numbers.get(known[label].host or 0))), "maisi_id": label}
            for label, number in numbers.items()]  # fmt: skip
    return {"schema": SCHEMA, "vocabulary": RENUMBERED, "labels": rows}


def require_labels(folder: Path, numbering: Numbering = ()) -> None:
    """Refuse a folder whose `labels.json` is not maisi's, or gives other names to the same numbers.

    Raises `UsageError`.
    """
    there = _read(folder / NAME)
    if there is not None:
        names = dict(enumerate(map(maisi().name_of, numbering), start=1)) or {label.id: label.name for label in maisi().labels}
        _require_same(folder / NAME, there, RENUMBERED if numbering else "maisi", names)


def require_one_numbering(numberings: Iterable[Numbering]) -> None:
    """Refuse label maps for one folder that number their labels differently. Raises `UsageError`."""
    first: Numbering | None = None
    for numbering in numberings:
        if first is not None and numbering != first:
            raise UsageError(
                f"--compat reference would number labels {_words(first)} in some label maps and {_words(numbering)} in others",
                hint="use one --out for each --anatomy, or leave --compat out",
            )
        first = numbering


def write_labels(folder: Path, numbering: Numbering = ()) -> Path:
    """Write `labels.json` to a folder, and return its path; what is there already and says the same is left alone.

    Labels that only the file there knows (those of a plugin) stay in it. Raises `UsageError` as `require_labels` does.
    """
    path = folder / NAME
    made = _joined(path, document(numbering))
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in made["labels"])
    text = f'{{"schema": "{SCHEMA}", "vocabulary": "{made["vocabulary"]}", "labels": [\n{rows}\n]}}\n'.encode()
    try:
        same = path.read_bytes() == text
    except FileNotFoundError:
        same = False
    if not same:
        write_atomic(path, text)
    return path


def read_labels(folder: Path) -> dict[str, Any] | None:
    """Return the `labels.json` of a folder, or None where there is none, or one of another program."""
    try:
        return _read(folder / NAME)
    except UsageError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    found: Any = None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        pass
    rows = found.get("labels") if isinstance(found, dict) and found.get("schema") == SCHEMA else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UsageError(f"{path} is not one that maisi wrote", hint="move it away, or choose another --out")
    return dict(found)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("id"), int) and isinstance(row.get("name"), str)


def _joined(path: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Return a document with the labels that only the file at `path` has."""
    there = _read(path)
    if there is None:
        return made
    _require_same(path, there, made["vocabulary"], {row["id"]: row["name"] for row in made["labels"]})
    rows = {row["id"]: row for row in (*there["labels"], *made["labels"])}
    return {**made, "labels": [rows[id] for id in sorted(rows)]}


def _require_same(path: Path, there: Mapping[str, Any], vocabulary: str, names: Mapping[int, str]) -> None:
    if there.get("vocabulary") != vocabulary:
        raise UsageError(f"{path} names labels of {there.get('vocabulary')}, and this run's are those of {vocabulary}", hint=_OTHER)
    for row in there["labels"]:
        name = names.get(row["id"], row["name"])
        if row["name"] != name:
            raise UsageError(f"in {path} {row['id']} is {row['name']}, and in this run it is {name}", hint=_OTHER)


def _words(numbering: Sequence[int]) -> str:
    return ", ".join(f"{number} {maisi().name_of(label)}" for number, label in enumerate(numbering, start=1)) or "as MAISI does"
