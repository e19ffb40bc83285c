"""The run record: one JSON file beside every sample that says how it was made and can make it again.

Everything but the key `timing` is the same when the run is repeated with the same versions on the same
platform.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .errors import UsageError
from .files import refuse_overwriting, write_atomic
from .geometry import Geometry

SCHEMA = "maisi.record/1"
PACKAGES = ("monai", "nibabel", "numpy", "scipy", "torch")
LOOK = "give a *_record.json that maisi wrote"
_TABLES = {"settings": ("value", "origin"), "outputs": ("file", "sha256")}


def build(
    *,
    id: str,
    index: int,
    seed: int,
    attempt: int,
    derived_seed: int,
    settings: Mapping[str, Any],
    origins: Mapping[str, str],
    model: Mapping[str, Any],
    geometry: Geometry,
    modality: str,
    mask: Mapping[str, Any] | None,
    verdict: Any | None,
    outputs: Mapping[str, Path],
    seconds: Mapping[str, float],
    peak_gib: float | None = None,
    device: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    plugins: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the record of one sample as plain JSON data.

    `settings` maps every resolved setting to its value and `origins` to where it came from; `model` holds
    name, licence and weights (part, file, sha256); `mask` says where the mask came from; `verdict` is a
    quality verdict (None: not checked); `outputs` maps a kind (`image`, `label`) to a finished file or folder,
    which is hashed here. Raises `ValueError` for a setting without an origin, `TypeError` for a value that JSON cannot
    hold.
    """
    if set(settings) - set(origins):
        raise ValueError(f"settings without an origin: {', '.join(sorted(set(settings) - set(origins)))}")
    return {
        "schema": SCHEMA,
        "synthetic": True,
        "tool": {"name": "maisi", "version": __version__},
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": _versions(),
            "device": plain(device or {}),
        },
        "id": id,
        "index": index,
        "seed": seed,
        "attempt": attempt,
        "derived_seed": derived_seed,
        "settings": {name: {"value": plain(value), "origin": origins[name]} for name, value in settings.items()},
        "model": plain(model),
        "modality": modality,
        "geometry": plain(geometry),
        "mask": plain(mask),
        "qc": plain(verdict.as_dict()) if verdict is not None else None,
        "outputs": {kind: {"file": path.name, "sha256": sha256_of(path), "bytes": _bytes(path)} for kind, path in outputs.items()},
        "notes": list(notes),
        "plugins": plain(plugins or {}),
        "timing": {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            "peak_gib": None if peak_gib is None else round(peak_gib, 3),
        },
    }


def write(path: str | Path, record: Mapping[str, Any], *, force: bool = False) -> Path:
    """Write a record as sorted, indented JSON. Raises `UsageError` when the file exists without `force`."""
    path = Path(path)
    refuse_overwriting(path, force=force)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"not a record: schema {record.get('schema')!r}")
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())
    return path


def read(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises `UsageError` for a missing file and for one that is not a record."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"the record {path} does not exist", hint=LOOK)
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not JSON: {error}", hint=LOOK) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        found = f"has the schema {schema!r}" if schema else "has no schema"
        newer = isinstance(schema, str) and schema.startswith("maisi.record/")
        raise UsageError(
            f"{path} {found}, not {SCHEMA!r}",
            hint="it comes from another version: update maisi" if newer else LOOK,
        )
    missing = [key for key in ("settings", "model", "seed", "outputs") if key not in record]
    if missing:
        raise UsageError(f"{path} is an incomplete record: it lacks {', '.join(missing)}", hint=LOOK)
    wrong = next((key for key, entries in _TABLES.items() if not _is_table(record[key], entries)), None)
    if wrong is not None:
        raise UsageError(f"{path} is not a record that maisi wrote: its {wrong} are of another form", hint=LOOK)
    return record


def _is_table(value: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) and all(key in each for key in keys) for each in value.values())


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that repeat the run: every recorded value, with the model that `auto` stood for."""
    settings = {name: entry["value"] for name, entry in record["settings"].items()}
    if settings.get("model", "auto") == "auto":
        settings["model"] = record["model"]["name"]
    return settings


def changed_outputs(record: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Return the file names of outputs that are missing from `folder` or differ from what was recorded."""
    return [
        entry["file"]
        for entry in record["outputs"].values()
        if not (path := Path(folder) / entry["file"]).exists() or sha256_of(path) != entry["sha256"]
    ]


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    That of a folder is of the lines `DIGEST  PATH` of all of its files, sorted by path: `sha256sum` of what it prints itself.
    """
    path = Path(path)
    if path.is_dir():
        lines = (f"{sha256_of(each)}  {each.relative_to(path).as_posix()}\n" for each in _files(path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (_files(path) if path.is_dir() else [path]))


def plain(value: Any) -> Any:
    """Return a value as JSON data: dataclasses become mappings, paths strings, NaN and infinity None.

    Raises `TypeError` for anything else that JSON does not know.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        return plain(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    raise TypeError(f"a record cannot hold {type(value).__name__}: {value!r}")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
