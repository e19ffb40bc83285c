"""A list of samples to make: a row each, with an id and settings of its own; or a folder of masks, with a row for each.

CSV with a header line, or JSON lines (`.jsonl`). The column `id` names the files; every other column is a setting of
`generate` (`seed`, `preset`, `mask`, `anatomy`, `steps`, ...). An empty cell leaves a setting as the whole run has it. Paths in it
are seen from the manifest's own folder.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError, unknown
from .files import NIFTI_ENDS, stem
from .labelfile import numbering_of, require_one_numbering
from .settings import KEYS, MANIFEST_ROW, MASK_FOLDER, Layer, Resolved, resolve

OF_THE_RUN = ("manifest", "out", "count", "name", "resume", "force", "shard", "executor", "offline")
"""Settings that are those of the whole run, and no row's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample to make: its name, and the settings in which it differs from the run's."""

    id: str
    values: Mapping[str, Any]


def resolve_all(flags: Mapping[str, Any] | None = None, **layers: Any) -> list[Resolved]:
    """Return the settings of a run, of each row of its manifest, or of each mask of the folder that `mask` names.

    Arguments are those of `settings.resolve`.

    Row k is sample k of the run: its seed derives from (seed, k), unless the row has a seed of its own. Raises `UsageError`
    for rows whose label maps would number their labels differently (`--compat reference`).
    """
    whole = resolve(flags, **layers)
    layers.pop("index", None)
    path = whole.settings.manifest
    if path is None and whole.settings.mask is not None and Path(whole.settings.mask).is_dir():
        rows = masks_of(Path(whole.settings.mask), count=whole.settings.count)
        return [_resolved(MASK_FOLDER, row, k, flags, layers) for k, row in enumerate(rows)]
    if path is None:
        return [whole]
    if whole.settings.count != 1:
        raise UsageError("--count and --manifest exclude each other: a manifest has a row for every sample", hint="leave --count out")
    rows = read_manifest(Path(path))
    found = [_resolved(MANIFEST_ROW, row, k, flags, layers) for k, row in enumerate(rows)]
    chosen = (each.settings for each in found)
    require_one_numbering(numbering_of(each) for each in chosen if each.mode != "image" and "nifti" in each.format)
    return found


def _resolved(kind: str, row: Row, index: int, flags: Mapping[str, Any] | None, layers: Mapping[str, Any]) -> Resolved:
    return resolve(flags, **layers, row=Layer(origin=kind + row.id, values={**row.values, "name": _literally(row.id)}), index=index)


def masks_of(folder: Path, *, count: int = 1) -> list[Row]:
    """Return a row for each label map of a folder, `count` for each when there shall be several images of one.

    Rows are named after their files, and numbered where `count` is above 1. Raises `UsageError` for a folder without any.
    """
    found = sorted(path for path in folder.iterdir() if path.name.endswith(NIFTI_ENDS) and not path.name.startswith("."))
    if not found:
        raise UsageError(f"the folder {folder} holds no label map", hint="give a folder with .nii.gz files, or one file")
    names = [stem(path) for path in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{folder} holds {twice}.nii and {twice}.nii.gz", hint="take one of them away")
    return [Row(id=name if count == 1 else f"{name}_{copy:04d}", values={"mask": str(path), "count": 1})
            for name, path in zip(names, found, strict=True) for copy in range(count)]  # fmt: skip


def read_manifest(path: Path) -> list[Row]:
    """Read a manifest. Raises `UsageError` for a file that is none, unknown columns, and ids that are missing or twice there."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"the manifest {path} cannot be read: {error}", hint="give a CSV file with a column id, or JSON lines") from error
    tables = _json_lines(text, path) if path.suffix == ".jsonl" else _csv(text, path)
    rows: list[Row] = []
    taken: set[str] = set()
    for number, table in tables:
        where = f"{path}, line {number}"
        values = {key.strip().replace("-", "_"): value for key, value in table.items() if value is not None and value != ""}
        name = str(values.pop("id", "")).strip()
        if not name:
            raise UsageError(f"{where} has no id", hint="give each row an id: its files are named after it")
        if name.casefold() in taken:
            raise UsageError(f"{where}: the id {name!r} is there twice", hint="give each row an id of its own")
        taken.add(name.casefold())
        for key in values:
            if key in OF_THE_RUN:
                raise UsageError(f"{where}: {key} is of the whole run, and no row's own", hint=f"leave the column out; use --{key}")
            if key not in KEYS:
                raise unknown(
                    "manifest column", key, ["id", *(each for each in KEYS if each not in OF_THE_RUN)], see="maisi generate --help"
                )
        rows.append(Row(id=name, values={key: _beside(path, key, value) for key, value in values.items()}))
    if not rows:
        raise UsageError(f"the manifest {path} has no rows", hint="give it a line for every sample, below a header with a column id")
    return rows


def _csv(text: str, path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines())
    if "id" not in [name.strip() for name in reader.fieldnames or ()]:
        raise UsageError(f"the manifest {path} has no column id", hint="write a header line such as  id,seed,preset")
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for table in reader:
        if None in table or None in table.values():
            raise UsageError(f"{path}, line {reader.line_num} has another number of cells than the header",
                             hint="put quotes around cells with commas in them")  # fmt: skip
        rows.append((reader.line_num, {key: (value or "").strip() for key, value in table.items()}))
    return rows


def _json_lines(text: str, path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    form = 'write a row a line, such as {"id": "a", "seed": 1}'
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            table = json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number} is not JSON: {error}", hint='write a row a line, such as {"id": "a", "seed": 1}'
            ) from error
        if not isinstance(table, dict):
            raise UsageError(f"{path}, line {number} is not an object", hint=form)
        rows.append((number, table))
    return rows


def _beside(manifest: Path, key: str, value: Any) -> Any:
    """Return a path of a row as seen from the manifest's folder."""
    names_a_file = key == "mask" or (key in ("model", "preset") and str(value).endswith(".toml"))
    return str(manifest.parent / str(value)) if names_a_file else value


def _literally(name: str) -> str:
    return name.replace("{", "{{").replace("}", "}}")
