"""Masks from the released database, or from one of the same layout: an index in JSON, and NIfTI files beside it.

The index is a list of entries `pseudo_label_filename`, `dim`, `spacing`, `label_list` and, for a part of them,
`top_region_index` and `bottom_region_index` (one-hot). The files lie in a folder or an archive `all_masks*` beside the
index, or beside it themselves; an archive is read as it is, never unpacked.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..anatomy import maisi, regions_of
from ..catalog import ModelSpec
from ..errors import CannotRun, UsageError
from ..events import Note, OnEvent, ignore
from ..geometry import Geometry, Size, Triple, format_triple
from ..lesions import augment
from ..seeds import derive
from ..settings import GenerateSettings
from ..volumes import Mask, read_mask
from .fitting import SAME_SPACING, fit, same_spacing
from .sources import INDEX, Made, Wanted, data_file, database_installed
from .tumors import Best, aim_of

POOL = 20  # of the masks closest to the volume, those that samples are drawn from first
BEST_OF = 12  # masks that are tried for a tumour of a given size
COVERS = 0.95  # of the field of view along each axis; a mask that covers less leaves air, which is said
STEP = 128  # voxels: masks that are smaller than the volume by this much along an axis are too coarse (reference.md 2.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One mask of a database: its file, relative to the folder of masks, its grid, its labels and the regions it shows."""

    file: str
    size: Size
    spacing: Triple
    ids: frozenset[int]
    regions: tuple[int, int] | None


# --- the index ------------------------------------------------------------------------------------------


def read_index(path: Path, *, compat: bool = False) -> list[Entry]:
    """Read the index of a database. Raises `UsageError` that names the entry and its key.

    A part of the released entries lists no regions: they are those that the labels show, and with `compat` none.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise UsageError(f"the mask database {path} cannot be read: {error}", hint="give the JSON index of the masks") from error
    return list(_entries(path, compat, (about.st_mtime_ns, about.st_size)))


@lru_cache(maxsize=4)
def _entries(path: Path, compat: bool, version: tuple[int, int]) -> tuple[Entry, ...]:
    """Read an index; the rows of a manifest share what one of them read, while the file stays the same `version`."""
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the mask database {path} cannot be read: {error}", hint="give the JSON index of the masks") from error
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{path} is not the index of a mask database", hint="give the JSON list of the masks, candidate_masks_*.json")
    return tuple(_entry(row, number, path, compat) for number, row in enumerate(rows))


def _entry(row: Any, number: int, path: Path, compat: bool) -> Entry:
    def wrong(key: str) -> UsageError:
        return UsageError(f"{path}: entry {number} has no usable {key}", hint="give the released index, or correct the entry")

    if not isinstance(row, dict) or not isinstance(row.get("pseudo_label_filename"), str):
        raise wrong("pseudo_label_filename")
    file = PurePosixPath(row["pseudo_label_filename"])
    if file.is_absolute() or ".." in file.parts or "\\" in str(file):
        raise UsageError(f"{path}: entry {number} names the file {str(file)!r}, outside the database", hint="do not use this index")
    try:
        size, spacing = tuple(map(int, row["dim"])), tuple(map(float, row["spacing"]))
    except (KeyError, TypeError, ValueError) as error:
        raise wrong("dim or spacing") from error
    if len(size) != 3 or len(spacing) != 3 or min(size) < 1 or not min(spacing) > 0:
        raise wrong("dim or spacing")
    try:
        ids = frozenset(map(int, row["label_list"]))
    except (KeyError, TypeError, ValueError) as error:
        raise wrong("label_list") from error
    regions: tuple[int, int] | None
    try:
        regions = row["top_region_index"].index(1), row["bottom_region_index"].index(1)
    except (KeyError, ValueError, AttributeError):
        regions = None if compat else regions_of(ids)
    return Entry(file=str(file), size=size, spacing=spacing, ids=ids, regions=regions)  # type: ignore[arg-type]


# --- searching ------------------------------------------------------------------------------------------


def suitable(entries: Sequence[Entry], wanted: Wanted) -> list[Entry]:
    """Return the entries that hold what is wanted, whatever their grid."""
    return [each for each in entries if not wanted.missing(each.ids) and wanted.shows(each.regions) and not wanted.tumors(each.ids)]


def exact(entries: Sequence[Entry], geometry: Geometry, *, compat: bool = False) -> list[Entry]:
    """Return the entries on the very grid that is wanted.

    With `compat` spacings are compared as floats, exactly, by which the reference almost never finds a mask.
    """
    tolerance = 0.0 if compat else SAME_SPACING
    return [each for each in entries if each.size == geometry.size and same_spacing(each.spacing, geometry.spacing, tolerance)]


def closest(entries: Sequence[Entry], geometry: Geometry) -> list[Entry]:
    """Return the entries that are fine enough, closest grid first; entries that are equally close keep their order.

    The distance adds up, over the axes, |field of view| / 10 mm + |voxels| / 100 + |spacing| (reference.md 2.4).
    """
    fine = [each for each in entries if all(n > new - STEP for n, new in zip(each.size, geometry.size, strict=True))]
    return sorted(fine, key=lambda each: distance(each, geometry))


def distance(entry: Entry, geometry: Geometry) -> float:
    """Return how far an entry's grid is from a geometry."""
    axes = zip(entry.size, entry.spacing, geometry.size, geometry.spacing, strict=True)
    return sum(abs(n * mm - new * new_mm) / 10 + abs(n - new) / 100 + abs(mm - new_mm) for n, mm, new, new_mm in axes)


# --- the source -----------------------------------------------------------------------------------------


class Database:
    """The mask source `database`: a mask on the very grid that is asked for, else the closest ones, resampled.

    Which mask a sample gets depends on its seed alone. Opening it searches the index; a mask's voxels are read when it is
    drawn.
    """

    honours = frozenset({"mask_database", "tumor"})
    parts: tuple[str, ...] = ()

    def __init__(self, settings: GenerateSettings, spec: ModelSpec, *, device: str = "cpu", dtype: str = "fp32") -> None:
        self.index = index_of(settings, spec)
        self.compat = settings.compat == "reference"
        self.aim = aim_of(settings)
        self.wanted = Wanted.of(settings, {self.aim.tumor} if self.aim else ())
        entries = read_index(self.index, compat=self.compat)
        found = suitable(entries, self.wanted)
        if not found:
            raise UsageError(f"none of the {len(entries)} masks of {self.index.name} {self._wish(settings)}",
                             hint="leave something out of --anatomy, or choose another --preset")  # fmt: skip
        geometry = settings.geometry()
        self._told = False
        self.exact = exact(found, geometry, compat=self.compat)
        self.ranked = [*self.exact, *(each for each in closest(found, geometry) if each not in self.exact)]
        if not self.ranked:
            raise UsageError(f"the {len(found)} masks of {self.index.name} that fit are too coarse for {format_triple(geometry.size)}",
                             hint="use a smaller --size, or --mask-source diffusion")  # fmt: skip

    def _wish(self, settings: GenerateSettings) -> str:
        parts = [f"shows {', '.join(settings.regions)}"] * bool(settings.regions)
        parts += [f"holds {', '.join(settings.anatomy)}"] * bool(settings.anatomy)
        if self.aim and self.aim.request:
            parts.append(f"has a {self.aim.request.name}")
        return ", ".join([*parts, "and is free of other tumours"]) if parts else "is free of tumours"

    def __call__(self, settings: GenerateSettings, geometry: Geometry, seed: int, *, on_event: OnEvent = ignore) -> Made:
        """Draw a mask, put it on `geometry`, vary it, and make sure that what was asked for is still in it.

        Of a tumour of a given size the best of several masks is taken. Raises `UsageError` when no mask of the database
        keeps what was asked for.
        """
        best, reasons = Best(aim=self.aim), []
        if not self._told and settings.count > len(self.first()):
            self._told = True
            shared = f"{settings.count} samples share {len(self.first())} of the masks of {self.index.name}: no more fit as well"
            on_event(Note(text=shared, level="warning"))
        for number, entry in enumerate(self.drawn(seed)):
            mask, about = self.varied(entry, geometry, derive(seed, number, 0, "augment"), on_event=on_event)
            problem = self.wanted.problem(mask)
            if problem is not None:
                reasons.append(f"{entry.file} {problem}")
                on_event(Note(text=f"mask {reasons[-1]}: the next one is taken"))
            elif best.offer(mask, about) or best.tries == BEST_OF:
                break
        if best.mask is None:
            raise UsageError(f"no mask of {self.index.name} can be used: {reasons[0]}",
                             hint="leave something out of --anatomy, or use a larger --fov")  # fmt: skip
        if shortfall := best.shortfall():
            on_event(Note(text=shortfall, level="warning"))
        return Made(mask=best.mask, about=best.record())

    def varied(self, entry: Entry, geometry: Geometry, seed: int, *, on_event: OnEvent = ignore) -> tuple[Mask, dict[str, Any]]:
        """Return a mask on `geometry`, its tumours moved or its body a little larger or smaller, and what was done to it."""
        stored = self.read(entry, on_event=on_event)
        mask = fit(stored, geometry, compat=self.compat)
        if self.wanted.problem(mask) is not None:
            return mask, {}
        done = augment(mask.array, seed=seed, spacing_mm=geometry.spacing, compat=self.compat)
        change = {"moved": [maisi().name_of(label) for label in done.moved], "stayed": [maisi().name_of(label) for label in done.stayed],
                  "tries": done.tries, "zoom": round(done.zoom, 6)}  # fmt: skip
        covered = tuple(min(1.0, old / new) for old, new in zip(stored.geometry.fov_mm, geometry.fov_mm, strict=True))
        if min(covered) < COVERS:
            on_event(Note(text=f"mask {entry.file} covers {_mm(stored.geometry.fov_mm)} of {_mm(geometry.fov_mm)} mm: the rest is air",
                          level="warning"))  # fmt: skip
        about = {"database": self.index.name, "id": entry.file, "exact": mask.array is stored.array, "choices": len(self.first()),
                 "size": list(stored.geometry.size), "spacing_mm": list(stored.geometry.spacing)}  # fmt: skip
        return replace(mask, array=done.labels), {**about, "augmented": change}

    def first(self) -> list[Entry]:
        """Return the masks that samples are drawn from first."""
        return self.exact or self.ranked[:POOL]

    def drawn(self, seed: int) -> list[Entry]:
        """Return the masks in the order in which sample `seed` tries them: the first ones shuffled, then the rest as ranked."""
        first = list(self.first())
        random.Random(seed).shuffle(first)
        return [*first, *self.ranked[len(first) :]]

    def read(self, entry: Entry, *, on_event: OnEvent = ignore) -> Mask:
        """Read the voxels of an entry. Raises `UsageError` for a file that is missing or damaged."""
        folder = self.index.parent
        for root in (folder, *sorted(folder.glob("all_masks*"))):
            if root.is_dir() and (root / entry.file).is_file():
                return read_mask(root / entry.file, on_event=on_event)
        for archive in sorted(folder.glob("all_masks*.zip")):
            mask = _from_archive(archive, entry.file, on_event)
            if mask is not None:
                return mask
        raise UsageError(f"the mask {entry.file} of {self.index.name} is not in {folder}",
                         hint="put the masks into a folder or archive all_masks* beside the index")  # fmt: skip


def _mm(fov: Triple) -> str:
    return "x".join(f"{value:.0f}" for value in fov)


def _from_archive(archive: Path, file: str, on_event: OnEvent) -> Mask | None:
    """Read one member of an archive, None when it has no such member; only that member is written out, to be read."""
    try:
        with zipfile.ZipFile(archive) as opened, TemporaryDirectory() as folder:
            names = set(opened.namelist())
            name = next((each for each in (f"{archive.stem}/{file}", file) if each in names), None)
            if name is None:
                return None
            path = Path(folder) / PurePosixPath(file).name  # nothing of the archive's paths is used
            path.write_bytes(opened.read(name))
            mask = read_mask(path, on_event=on_event)
            return Mask(array=np.array(mask.array), geometry=mask.geometry)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UsageError(f"{archive} cannot be read: {error}", hint="fetch the archive again") from error


def index_of(settings: GenerateSettings, spec: ModelSpec) -> Path:
    """Return the index of the database: that of the setting `mask_database`, else the model's.

    Raises `UsageError` when there is none, `CannotRun` when the model's is not installed.
    """
    if settings.mask_database is not None:
        path = Path(settings.mask_database)
        if path.is_dir():
            found = [each for each in sorted(path.glob("*.json")) if "mask" in each.name]
            if len(found) != 1:
                raise UsageError(f"{path} holds {len(found)} indices of masks", hint="give the JSON file itself with --mask-database")
            return found[0]
        if not path.is_file():
            raise UsageError(f"there is no mask database {path}", hint="give its JSON index with --mask-database")
        return path
    path = data_file(spec, INDEX)  # type: ignore[assignment]
    if path is None:
        raise UsageError(f"model {spec.name} comes without a mask database", hint="give one with --mask-database INDEX.json")
    missing = path if not path.is_file() else None if database_installed(spec) else path.parent / "all_masks*.zip"
    if missing is not None:
        raise CannotRun(f"the mask database of {spec.name} is not installed: {missing} is missing",
                        hint=f"maisi models pull {spec.name} --mask-database, or your own: --mask-database INDEX.json")  # fmt: skip
    return path
