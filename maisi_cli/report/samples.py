"""The samples of a run as a page holds them: what their records say, a picture of each, and packed volumes of some."""

from __future__ import annotations

import base64
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import record
from ..anatomy import maisi
from ..errors import UsageError
from ..events import OnEvent, Step
from ..files import NIFTI_ENDS
from ..geometry import Size
from ..preview import centre, strip, windows_of
from ..quality import Finding
from ..volumes import Mask, Volume, read_image, read_mask, resample_labels

FID_SCHEMA = "maisi.fid/1"
AXIS_LIMIT = 128
"""Voxels an axis that an embedded volume has at most."""
CARD_PX, PICTURE_PX = 540, 720
"""Widths of the picture of a sample with and without its volume."""
LARGE_RUN = 100
"""Samples above which every picture has the smaller width."""
COLOURS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the record of one sample says, as far as the page shows it; `made` is the whole record."""

    path: Path
    made: Mapping[str, Any]
    id: str
    index: int
    seed: int
    modality: str
    model: str
    notes: tuple[str, ...]
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    passed: bool | None
    findings: tuple[Finding, ...]
    seconds: Mapping[str, float]
    peak_gib: float | None
    finished: str

    def get(self, *keys: str) -> Any:
        """Return what the record holds under keys within keys, None where it holds nothing."""
        value: Any = self.made
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A sample as the page holds it: its picture (PNG), its volumes as JSON and base64, and what is to be said about it.

    `bytes` is what picture and volumes add to the page.
    """

    case: Case
    picture: bytes | None
    facts: Mapping[str, Any]
    payloads: Mapping[str, str]
    notes: tuple[str, ...]
    bytes: int

    @property
    def shown_as(self) -> str:
        """`volume`, `picture` or `nothing`."""
        return "volume" if self.payloads else "picture" if self.picture else "nothing"


# --- reading the run ----------------------------------------------------------------------------------------


def read_cases(run: Path) -> list[Case]:
    """Return the samples of a folder by index; raises `UsageError` for a folder without records and for a damaged one."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise UsageError(f"the folder {run} {what}", hint="give a folder that  maisi generate  wrote to")
    paths = sorted(run.glob("*_record.json"))
    if not paths:
        raise UsageError(f"{run} holds no *_record.json", hint="give a folder that  maisi generate  wrote to")
    return sorted((_case(path) for path in paths), key=lambda case: (case.index, case.id))


def _case(path: Path) -> Case:
    made = record.read(path)
    try:
        judged, timing = made["qc"], made["timing"]
        return Case(
            path=path,
            made=made,
            id=_text(made["id"]),
            index=_whole(made["index"]),
            seed=_whole(made["seed"]),
            modality=_text(made["modality"]),
            model=_text(made["model"]["name"]),
            notes=tuple(map(_text, made["notes"])),
            size=tuple(_whole(n) for n in made["geometry"]["size"]),
            spacing=tuple(_number(mm) for mm in made["geometry"]["spacing"]),
            passed=None if judged is None else bool(judged["passed"]),
            findings=() if judged is None else tuple(_finding(each) for each in judged["findings"]),
            seconds={_text(stage): _number(value) for stage, value in timing["seconds"].items()},
            peak_gib=None if timing["peak_gib"] is None else _number(timing["peak_gib"]),
            finished=_text(timing["finished"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{path} is a damaged record: {what}", hint="repeat the sample, or move its record away") from error


def _finding(row: Mapping[str, Any]) -> Finding:
    bound = {key: None if row.get(key) is None else _number(row[key]) for key in ("value", "low", "high")}
    label = row.get("label")
    return Finding(check=_text(row["check"]), label=None if label is None else str(label), passed=bool(row["passed"]),
                   text=str(row.get("text", "")), informative=bool(row.get("informative", False)), **bound)  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def read_distances(run: Path) -> tuple[list[tuple[str, Mapping[str, Any]]], tuple[str, ...]]:
    """Return name and content of each result of `maisi fid` in the folder, and what is to be said about those that cannot be read."""
    found, notes = [], []
    for path in sorted(run.glob("*fid*.json")):
        if path.name.endswith("_record.json"):
            continue
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            notes.append(f"{path.name} is not JSON and was left out")
            continue
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema == FID_SCHEMA:
            found.append((path.name, data))
        elif str(schema).startswith("maisi.fid/"):
            notes.append(f"{path.name} comes from another version ({schema}, not {FID_SCHEMA}) and was left out")
    return found, tuple(notes)


# --- pictures and volumes -----------------------------------------------------------------------------------


def make_entries(cases: Sequence[Case], volumes: int, on_event: OnEvent) -> tuple[Entry, ...]:
    """Return the samples in the order of `cases`; those that failed are the first to be embedded as volumes."""
    order = sorted(range(len(cases)), key=lambda k: (cases[k].passed is not False, k))
    made: dict[int, Entry] = {}
    left = volumes
    for done, k in enumerate(order, 1):
        made[k] = _entry(cases[k], embed=left > 0, width=CARD_PX if left > 0 or len(cases) > LARGE_RUN else PICTURE_PX)
        left -= bool(made[k].payloads)
        on_event(Step(stage="read", done=done, total=len(order)))
    return tuple(made[k] for k in range(len(cases)))


def _entry(case: Case, *, embed: bool, width: int) -> Entry:
    notes: list[str] = []
    image = mask = None
    for kind in ("image", "label"):
        path = _output(case, kind, notes)
        if path is None:
            continue
        try:
            if kind == "image":
                image = read_image(path, modality=case.modality)
            else:
                mask = _named(read_mask(path), case)
        except UsageError as error:
            notes.append(error.message.replace(f"{path.parent}/", ""))
    if image is not None and mask is not None and not image.geometry.close_to(mask.geometry, tolerance_mm=0.1):
        notes.append("image and label map lie on different grids, so only the image is shown")
        mask = None
    if image is None and mask is None:
        picture = _stored_picture(case, width)
        return Entry(case=case, picture=picture, facts={}, payloads={}, notes=tuple(notes), bytes=_base64_size(picture))
    picture = _png(strip(image, mask, width=width))
    facts, payloads = _volume(image, mask, case) if embed else ({}, {})
    size = _base64_size(picture) + sum(map(len, payloads.values()))
    return Entry(case=case, picture=picture, facts=facts, payloads=payloads, notes=tuple(notes), bytes=size)


def _named(mask: Mask, case: Case) -> Mask:
    """Return the mask with MAISI ids: the reference's numbers 1, 2, ... (`masks.renumbered`) stand for what was asked for by name."""
    settings = record.settings_of(case.made)
    if settings.get("compat") != "reference" or case.get("mask", "source") == "file":
        return mask
    names = [str(text).partition("=")[0] for text in settings.get("anatomy_size") or settings.get("anatomy") or ()]
    if not names or not set(mask.ids()) <= set(range(1, len(names) + 1)):
        return mask
    table = np.zeros(256, dtype=np.uint8)
    table[1 : len(names) + 1] = [maisi().id(name) for name in names]
    return replace(mask, array=table[mask.array])


def _output(case: Case, kind: str, notes: list[str]) -> Path | None:
    """Return the NIfTI file of a kind that the record names, None where there is none; what is wrong with it is noted."""
    entry = case.made["outputs"].get(kind)
    if entry is None or not str(entry["file"]).endswith(NIFTI_ENDS):
        return None
    name = str(entry["file"])
    path = case.path.parent / name
    if Path(name).name != name or not path.is_file():
        notes.append(f"{name} is missing")
        return None
    if record.sha256_of(path) != entry["sha256"]:
        notes.append(f"{name} is not the file that was recorded: its SHA-256 differs")
    return path


def _stored_picture(case: Case, width: int) -> bytes | None:
    """Return the preview that lies beside a sample whose volumes cannot be shown, smaller."""
    from PIL import Image

    name = str(case.made["outputs"].get("preview", {}).get("file", ""))
    path = case.path.parent / name
    if Path(name).name != name or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((width, width))
    return _png(picture)


def _png(picture: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _base64_size(content: bytes | None) -> int:
    return 0 if content is None else (len(content) + 2) // 3 * 4


def _volume(image: Volume | None, mask: Mask | None, case: Case) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the viewer needs to know of a sample, and its volumes as base64 by kind."""
    item = image if image is not None else mask
    assert item is not None
    limited = [min(n, AXIS_LIMIT) for n in item.geometry.size]
    size = (limited[0], limited[1], limited[2])
    voxel_ml = math.prod(item.geometry.spacing) / 1000
    counts = mask.counts() if mask is not None else np.zeros(256, dtype=np.int64)
    if image is not None:
        image = shrink(image, size)
    if mask is not None:
        mask = resample_labels(mask, size)
    facts: dict[str, Any] = {
        "id": case.id,
        "ct": case.modality.startswith("ct"),
        "size": list(size),
        "spacing": [round(mm * old / new, 6) for mm, old, new in zip(item.geometry.spacing, item.geometry.size, size, strict=True)],
        "full": list(item.geometry.size),
        "start": list(centre(image, mask)),
        "labels": [[int(value), round(float(counts[value]) * voxel_ml, 3)] for value in np.flatnonzero(counts) if value],
    }
    payloads = {}
    if image is not None:
        low, high = float(image.array.min()), float(image.array.max())
        window = windows_of(image, None)[0]
        facts["range"] = [low, max(high, low + 1)]
        facts["auto"] = [round(window.low, 3), round(max(window.high, window.low + 1), 3)]
        payloads["image"] = packed(image.array)
    if mask is not None:
        payloads["label"] = packed(mask.array)
    return facts, payloads


def shrink(volume: Volume, size: Size) -> Volume:
    """Return a volume on `size` voxels over the same field of view as int16: each the mean of what it covers, rounded."""
    array = volume.array.astype(np.float32, copy=False)
    for axis, new in enumerate(size):
        if new != array.shape[axis]:
            array = np.moveaxis(np.tensordot(_cover(array.shape[axis], new), array, axes=(1, axis)), 0, axis)
    limits = np.iinfo(np.int16)
    return replace(volume, array=np.clip(np.rint(array), limits.min, limits.max).astype(np.int16), geometry=volume.geometry.resized(size))


def _cover(old: int, new: int) -> NDArray[np.float32]:
    """Return the share of each of `old` voxels in each of `new` ones over the same length: (new, old), rows sum to 1."""
    edges = np.arange(new + 1) * old / new
    first, last = np.arange(old), np.arange(1, old + 1)
    overlap = np.minimum(edges[1:, None], last) - np.maximum(edges[:-1, None], first)
    return (np.clip(overlap, 0, None) * new / old).astype(np.float32)


def packed(array: NDArray[Any]) -> str:
    """Return a volume as base64 of deflated bytes, x fastest; of int16 all low bytes come first, then all high ones."""
    flat = np.ascontiguousarray(array.ravel(order="F"))
    planes = flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(flat.size, -1).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode("ascii")
