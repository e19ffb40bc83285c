"""Data lists: which files are cases, what is known of each, and which cases are held out.

A list is the JSON of the reference, `{"training": [{"image", "label", "spacing", "modality", "fold", ...}], "testing": [...]}`, or
a CSV with columns of the same names. Paths are seen from the list's own folder. `{"lists": [{"list": FILE, "base": DIR}, ...]}`
stands for several lists, one after the other.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import NIFTI_ENDS, stem, write_atomic
from ..geometry import Size, Triple
from ..record import sha256_of

LIST_NAME = "list.json"
HELD_OUT = 0
"""The fold that is held out where no other is named."""
SECTIONS = ("training", "testing")
FILES = ("image", "label", "latent")
_REGIONS = ("top_region_index", "bottom_region_index")
_KNOWN = ("id", *FILES, "spacing", "modality", "class", "fold", "dim", *_REGIONS, "vae_sha256", "split")
_TRIPLES = ("spacing", "dim")

Regions = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One entry of a list, with absolute paths; `latent` is there after `encode`.

    `spacing_mm` is in RAS order. `dim` are the voxels of the volume, `regions` the one-hot rows (4,) of the top and the bottom
    body region, `vae_sha256` names the VAE that made the latent; None where the list does not say. `extra` holds every other key.
    """

    id: str
    image: Path | None
    label: Path | None
    latent: Path | None
    spacing_mm: Triple
    modality: str
    fold: int
    dim: Size | None = None
    regions: Regions | None = None
    vae_sha256: str | None = None
    section: str = "training"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An entry as it stands in its list: `where` names list and row, `base` is the folder that its paths are seen from."""

    where: str
    base: Path
    section: str
    values: Mapping[str, Any]


# --- reading ------------------------------------------------------------------------------------


def read_list(path: str | Path, *, base: str | Path | None = None, sections: Sequence[str] = ("training",)) -> list[Case]:
    """Read a data list, or the one in a folder; paths in it are seen from `base` (its own folder).

    Raises `UsageError` for a file that is none, an empty list, missing files, ids that are there twice, and values that are
    none, naming the row.
    """
    return read_lists([path], bases=[base] if base is not None else (), sections=sections)


def read_lists(
    paths: Sequence[str | Path], *, bases: Sequence[str | Path] = (), sections: Sequence[str] = ("training",)
) -> list[Case]:  # fmt: skip
    """Read several lists as one. There is one of `bases` for all of them, or one for each. Raises `UsageError` as `read_list` does."""
    rows = [row for row in all_rows(paths, bases) if row.section in sections]
    cases = [case_of(row) for row in rows]
    require_ids(rows, cases)
    if not cases:
        raise UsageError(f"{', '.join(map(str, paths))} lists no cases", hint="make some:  maisi data phantom --count 32 --out DIR")
    return cases


def require_ids(rows: Sequence[Row], cases: Sequence[Case]) -> None:
    """Refuse an id that two entries have, but for case. Raises `UsageError`, naming both rows."""
    first: dict[str, str] = {}
    for row, case in zip(rows, cases, strict=True):
        if case.id.casefold() in first:
            raise UsageError(f"{row.where}: the id {case.id!r} is there already ({first[case.id.casefold()]})",
                             hint="give each case an id of its own: its files are named after it")  # fmt: skip
        first[case.id.casefold()] = row.where


def all_rows(paths: Sequence[str | Path], bases: Sequence[str | Path] = ()) -> list[Row]:
    """Return the entries of all lists, of every section, as they stand there. Raises `UsageError` for files that are no list."""
    if len(bases) not in (0, 1, len(paths)):
        raise UsageError(
            f"there are {len(paths)} lists and {len(bases)} base folders", hint="give one --base for all, or one for each list"
        )
    folders: list[Path | None] = [Path(each) for each in bases] or [None]
    chosen = folders * len(paths) if len(folders) == 1 else folders
    return [row for path, base in zip(paths, chosen, strict=True) for row in rows_of(Path(path), base)]


def rows_of(path: Path, base: Path | None = None, *, joined: bool = True) -> list[Row]:
    """Return the entries of one list file, or of the one in a folder; with `joined` those of the lists that it names.

    Raises `UsageError` for a file that is no list.
    """
    path = path / LIST_NAME if path.is_dir() else path
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"there is no data list {path}", hint="make one:  maisi data phantom --count 32 --out DIR") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the data list {path} cannot be read: {error}", hint="give a JSON or CSV file") from error
    if path.suffix.casefold() == ".csv":
        return list(_csv_rows(text, path, base or path.parent))
    wrong = UsageError(f"{path} is not a data list", hint='it is JSON with a list under "training", or a .csv file with a header')
    try:
        content = json.loads(text)
    except ValueError as error:
        raise wrong from error
    if joined and isinstance(content, dict) and isinstance(content.get("lists"), list):
        return _joined(content["lists"], path, base or path.parent)
    if not isinstance(content, dict) or "training" not in content:
        raise wrong
    rows = []
    for section in SECTIONS:
        entries = content.get(section, [])
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise wrong
        rows += [Row(where=f"{path}, {section}[{k}]", base=base or path.parent, section=section,
                     values={key: value for key, value in each.items() if value is not None and value != ""})
                 for k, each in enumerate(entries)]  # fmt: skip
    return rows


def _joined(lists: Sequence[Any], path: Path, base: Path) -> list[Row]:
    rows: list[Row] = []
    for k, each in enumerate(lists):
        if not isinstance(each, dict) or not isinstance(each.get("list"), str):
            raise UsageError(f"{path}, lists[{k}] names no list", hint='write  {"list": FILE, "base": DIR}')
        rows += rows_of(base / each["list"], base / each["base"] if each.get("base") else None, joined=False)
    return rows


def _csv_rows(text: str, path: Path, base: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if not set(FILES) & set(names):
            raise UsageError(
                f"{path} has no column image, label or latent", hint="write a header line such as  id,image,label,modality,fold"
            )
        reader.fieldnames = names
        for table in reader:
            where = f"{path}, line {reader.line_num}"
            if None in table or None in table.values():
                raise UsageError(f"{where} has another number of cells than the header", hint="put quotes around cells with commas in them")
            values: dict[str, Any] = {key: value.strip() for key, value in table.items() if value.strip()}
            section = values.pop("split", "training")
            if section not in SECTIONS:
                raise UsageError(f"{where}: the split {section!r} is not known", hint=f"use {' or '.join(SECTIONS)}")
            for key in _TRIPLES:
                parts = [values.pop(f"{key}_{axis}", None) for axis in "xyz"]
                if any(parts):
                    values[key] = [part or "" for part in parts]
            yield Row(where=where, base=base, section=section, values=values)
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {reader.line_num} is not CSV: {error}", hint="put quotes around cells with commas in them"
        ) from error


# --- one entry ----------------------------------------------------------------------------------


def case_of(row: Row) -> Case:
    """Return the case that an entry describes. Raises `UsageError`, naming the row, for what is missing or no value."""
    values = row.values
    fields: dict[str, Any] = {name: read(row) for name, read in FIELDS.items()}
    return Case(
        id=id_of(row), vae_sha256=str(values["vae_sha256"]) if "vae_sha256" in values else None, section=row.section,
        extra={key: value for key, value in values.items() if key not in _KNOWN}, **fields,
    )  # fmt: skip


def id_of(row: Row) -> str:
    """Return the id of an entry: its own, or its first file's path with `_` between folders. Raises `UsageError` for no file name."""
    given = row.values.get("id")
    if given is None:
        name = Path(next((str(row.values[key]) for key in FILES if key in row.values), ""))
        parts = [*(() if name.is_absolute() else name.parent.parts), stem(name).removesuffix(".npy")]
        return "_".join(part for part in parts if part.strip("./\\")) or re.sub(r"\W+", "_", row.where)
    if not re.fullmatch(r"[^/\\\s.][^/\\\n\r\t]*", str(given)):
        raise UsageError(f"{row.where}: the id {given!r} is no file name", hint="use letters, digits, - and _: files are named after it")
    return str(given)


def _file(row: Row, key: str) -> Path | None:
    if key not in row.values:
        return None
    if not isinstance(row.values[key], str):
        raise UsageError(f"{row.where}: {key} is {row.values[key]!r}, and no path", hint=f'write  "{key}": "FILE"')
    file = row.base / row.values[key]
    if not file.is_file():
        raise UsageError(f"{row.where} names {row.values[key]}, which does not exist", hint="correct the list, or make the file")
    return file


def _spacing(row: Row) -> Triple:
    image = _file(row, "image")
    if "spacing" not in row.values and image is not None and image.name.endswith(NIFTI_ENDS):
        from ..volumes import read_geometry

        return read_geometry(image).spacing
    found = numbers(row.values.get("spacing"), 3)
    if found is None or min(found) <= 0:
        raise UsageError(f"{row.where} has no spacing of three positive numbers", hint='add  "spacing": [x, y, z]  in mm')
    return found[0], found[1], found[2]


def _modality(row: Row) -> str:
    found = row.values.get("modality", row.values.get("class"))
    if not isinstance(found, str):
        raise UsageError(f"{row.where} has no modality", hint='add  "modality": "ct", or another of  maisi labels list --modalities')
    return found


def _fold(row: Row) -> int:
    found = numbers(row.values.get("fold", 1), 1)
    if found is None or found[0] != int(found[0]):
        raise UsageError(f"{row.where}: the fold {row.values['fold']!r} is not a whole number", hint='write  "fold": 0  to hold a case out')
    return int(found[0])


def _dim(row: Row) -> Size | None:
    if "dim" not in row.values:
        return None
    found = numbers(row.values["dim"], 3)
    if found is None or min(found) < 1 or any(n != int(n) for n in found):
        raise UsageError(
            f"{row.where}: dim {row.values['dim']!r} is not three numbers of voxels", hint='write  "dim": [x, y, z], or leave it out'
        )
    return int(found[0]), int(found[1]), int(found[2])


def _regions(row: Row) -> Regions | None:
    given = [row.values[key] for key in _REGIONS if key in row.values]
    if not given:
        return None
    found = [numbers(each, 4) for each in given]
    if len(found) != 2 or None in found:
        raise UsageError(
            f"{row.where} needs both {' and '.join(_REGIONS)}, of four numbers each", hint='write  "top_region_index": [0, 1, 0, 0]'
        )
    top, bottom = (tuple(each) for each in found if each is not None)
    return top, bottom


def numbers(value: Any, count: int) -> list[float] | None:
    """Return `count` finite numbers from a number, a list, or text such as `1.5x1.5x2`, `1.5 1.5 2`, `[0, 1, 0, 0]`; None for all else."""
    parts: Any = value
    if isinstance(value, str):
        parts = re.split(r"\s*[x×,;\s]\s*", value.strip().strip("[]()").strip().casefold())
    elif isinstance(value, int | float):
        parts = [value]
    if not isinstance(parts, list | tuple) or len(parts) != count or any(isinstance(part, bool) for part in parts):
        return None
    try:
        found = [float(part) for part in parts]
    except (TypeError, ValueError):
        return None
    return found if all(map(math.isfinite, found)) else None


FIELDS: Mapping[str, Callable[[Row], Any]] = {
    **{key: partial(_file, key=key) for key in FILES}, "spacing_mm": _spacing, "modality": _modality, "fold": _fold, "dim": _dim,
    "regions": _regions,
}  # fmt: skip
"""What reads each field of a case from an entry; each raises `UsageError`, naming the row, for a value that is none."""


# --- writing, splitting -------------------------------------------------------------------------


def write_list(path: Path, rows: Iterable[Mapping[str, Any]], **more: Any) -> None:
    """Write a data list; `more` are further keys beside `training`."""
    write_atomic(path, json.dumps({"training": list(rows), **more}, indent=1).encode())


def split(cases: Sequence[Case], held_out: int = HELD_OUT) -> tuple[list[Case], list[Case]]:
    """Return (training, held out): the cases of other folds, and those of fold `held_out`. Raises `UsageError` when one is empty."""
    training = [case for case in cases if case.fold != held_out]
    held = [case for case in cases if case.fold == held_out]
    if not training:
        raise UsageError(f"every case of the list is held out (fold {held_out})", hint="give some cases another fold")
    if not held:
        folds = ", ".join(str(fold) for fold in sorted({case.fold for case in cases})[:8])
        raise UsageError(f"no case of the list is held out (fold {held_out}): its folds are {folds}",
                         hint=f'give some cases  "fold": {held_out}, about one in ten')  # fmt: skip
    return training, held


def data_hashes(path: str | Path, cases: Iterable[Case]) -> dict[str, str]:
    """Return the SHA-256 of what is trained on: of the list file, and of the VAE that made its latents where there are any.

    The list of `maisi data encode` holds the hashes of the images behind its latents.
    """
    path = Path(path)
    vaes = sorted({case.vae_sha256 for case in cases if case.vae_sha256})
    return {"list": sha256_of(path / LIST_NAME if path.is_dir() else path), **({"vae": " ".join(vaes)} if vaes else {})}
