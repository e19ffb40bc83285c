"""The report of a run: one HTML file with its samples, how they were made and how they were judged.

The page needs no network and no server: styles, script, pictures and volumes are inside. Volumes are embedded on at most
128 voxels an axis, for a limited number of samples; the rest are shown as pictures. Whatever comes from a record is text:
`tag` escapes it, and the page's Content-Security-Policy runs nothing but the scripts of `data/report/`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import record
from .anatomy import maisi
from .errors import UsageError
from .events import OnEvent, Step, ignore
from .files import refuse_overwriting, write_atomic
from .geometry import Size, format_triple
from .preview import LUNG_HU, SOFT_TISSUE_HU, centre, strip, windows_of
from .quality import Finding
from .settings import show
from .volumes import SUFFIXES, Mask, Volume, read_image, read_mask, resample_labels

SCHEMA = "maisi.report/1"
FID_SCHEMA = "maisi.fid/1"
VOLUMES = 12
"""How many samples are embedded as volumes, unless another number is asked for."""
AXIS_LIMIT = 128
"""Voxels an axis that an embedded volume has at most."""
CARD_PX, PICTURE_PX = 540, 720
"""Widths of the picture of a sample with and without its volume."""
COLOURS = 128
WINDOWS = (
    ("Soft tissue", *SOFT_TISSUE_HU),
    ("Lung", *LUNG_HU),
    ("Bone", -500.0, 1300.0),
    ("Brain", 0.0, 80.0),
)
"""Names and HU ranges of the window presets of CT."""
STAGES = ("mask", "denoise", "decode", "save")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report that was written: its file, its size and what it holds of each sample."""

    path: Path
    bytes: int
    entries: tuple[Entry, ...]
    fid: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as `maisi report --json` prints it (schema maisi.report/1)."""
        return {
            "schema": SCHEMA,
            "report": str(self.path),
            "bytes": self.bytes,
            "samples": [
                {"id": each.case.id, "passed": each.case.passed, "shown_as": each.shown_as, "bytes": each.bytes, "notes": list(each.notes)}
                for each in self.entries
            ],
            "fid": list(self.fid),
            "notes": list(self.notes),
        }


def report(
    run: str | Path, out: str | Path | None = None, *, volumes: int = VOLUMES, force: bool = False, on_event: OnEvent = ignore
) -> Report:
    """Write the page of the run in folder `run` to `out` (default: `report.html` in that folder).

    At most `volumes` samples are embedded as volumes: those that failed the quality check first, then the first ones. Equal
    runs give equal bytes. Raises `UsageError` for a folder without records, a damaged record, or a page that exists without
    `force`; an image or label map that is missing or damaged is noted in the page.
    """
    run = Path(run)
    out = run / "report.html" if out is None else Path(out)
    if volumes < 0:
        raise UsageError(f"--volumes is a number of samples from 0, not {volumes}", hint=f"leave it out for {VOLUMES}")
    cases = _cases(run)
    if out.is_dir():
        raise UsageError(f"{out} is a folder, not a file", hint="name the page, such as --out report.html")
    refuse_overwriting(out, force=force)
    entries = _entries(cases, volumes, on_event)
    distances, notes = _distances(run)
    page = _page(run, entries, distances, notes).encode()
    write_atomic(out, page)
    return Report(path=out, bytes=len(page), entries=entries, fid=tuple(name for name, _ in distances), notes=notes)


# --- reading the run ----------------------------------------------------------------------------------------


def _cases(run: Path) -> list[Case]:
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


def _distances(run: Path) -> tuple[list[tuple[str, Mapping[str, Any]]], tuple[str, ...]]:
    """Return name and content of each result of `maisi fid` in the folder, and what is to be said about those that are none."""
    found, notes = [], []
    for path in sorted(run.glob("*fid*.json")):
        if path.name.endswith("_record.json"):
            continue
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            notes.append(f"{path.name} is not JSON and was left out")
            continue
        if isinstance(data, dict) and data.get("schema") == FID_SCHEMA:
            found.append((path.name, data))
        else:
            notes.append(f"{path.name} is not a result of  maisi fid --json  ({FID_SCHEMA}) and was left out")
    return found, tuple(notes)


# --- pictures and volumes -----------------------------------------------------------------------------------


def _entries(cases: Sequence[Case], volumes: int, on_event: OnEvent) -> tuple[Entry, ...]:
    """Return the samples in the order of `cases`; those that failed are the first to be embedded as volumes."""
    order = sorted(range(len(cases)), key=lambda k: (cases[k].passed is not False, k))
    made: dict[int, Entry] = {}
    left = volumes
    for done, k in enumerate(order, 1):
        made[k] = _entry(cases[k], embed=left > 0)
        left -= bool(made[k].payloads)
        on_event(Step(stage="read", done=done, total=len(order)))
    return tuple(made[k] for k in range(len(cases)))


def _entry(case: Case, *, embed: bool) -> Entry:
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
                mask = read_mask(path)
        except UsageError as error:
            notes.append(error.message.replace(f"{path.parent}/", ""))
    if image is not None and mask is not None and not image.geometry.close_to(mask.geometry, tolerance_mm=0.1):
        notes.append("image and label map lie on different grids, so only the image is shown")
        mask = None
    if image is None and mask is None:
        picture = _stored_picture(case)
        return Entry(case=case, picture=picture, facts={}, payloads={}, notes=tuple(notes), bytes=_base64_size(picture))
    picture = _png(strip(image, mask, width=CARD_PX if embed else PICTURE_PX))
    facts, payloads = _volume(image, mask, case) if embed else ({}, {})
    size = _base64_size(picture) + sum(map(len, payloads.values()))
    return Entry(case=case, picture=picture, facts=facts, payloads=payloads, notes=tuple(notes), bytes=size)


def _output(case: Case, kind: str, notes: list[str]) -> Path | None:
    """Return the NIfTI file of a kind that the record names, None where there is none; what is wrong with it is noted."""
    entry = case.made["outputs"].get(kind)
    if entry is None or not str(entry["file"]).endswith(SUFFIXES):
        return None
    name = str(entry["file"])
    path = case.path.parent / name
    if Path(name).name != name or not path.is_file():
        notes.append(f"{name} is missing")
        return None
    if record.sha256_of(path) != entry["sha256"]:
        notes.append(f"{name} is not the file that was recorded: its SHA-256 differs")
    return path


def _stored_picture(case: Case) -> bytes | None:
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
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
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
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")


# --- HTML ---------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is markup already; any other text is escaped."""

    __slots__ = ()


VOID = frozenset({"img"})


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element: content and attributes are escaped unless they are `Html`, and None is left out.

    A trailing underscore of an attribute is dropped, others become hyphens; True is an attribute without a value.
    """
    named = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{named}>" if name in VOID else f"<{name}{named}>{join(*content)}</{name}>")


def join(*content: object) -> Html:
    """Return contents one after another, escaped unless they are `Html`; None is left out."""
    return Html("".join(each if isinstance(each, Html) else escape(str(each)) for each in content if each is not None))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = (), caption: str) -> Html:
    """Return a table; the first cell of a row is its header, `numbers` are the columns aligned to the right."""
    right = frozenset(numbers)

    def cells(row: Sequence[object]) -> Iterator[Html]:
        for k, cell in enumerate(row):
            yield tag("td" if k else "th", cell, scope=None if k else "row", class_="number" if k in right else None)

    top = tag("tr", *(tag("th", name, scope="col", class_="number" if k in right else None) for k, name in enumerate(head)))
    body = (tag("tr", *cells(row)) for row in rows)
    title = tag("caption", caption, class_="unseen")
    return tag("div", tag("table", title, tag("thead", top), tag("tbody", *body)), class_="scroll", tabindex="0", role="region",
               aria_label=caption)  # fmt: skip


def _facts(rows: Iterable[tuple[str, object]]) -> Html:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in rows))


def _data(name: str) -> bytes:
    return (files("maisi_cli") / "data" / "report" / name).read_bytes()


@cache
def _script_hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')}'"


def _page(run: Path, entries: Sequence[Entry], distances: Sequence[tuple[str, Mapping[str, Any]]], notes: Sequence[str]) -> str:
    embedded = any(each.payloads for each in entries)
    script, niivue = _data("report.js"), _data("niivue.umd.js.gz") if embedded else b""
    hashes = [_script_hash(script), *([_script_hash(gzip.decompress(niivue))] if embedded else [])]
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    name = run.resolve().name
    sections = [
        ("viewer", "Samples", None),
        ("quality", "Quality", _quality(entries)),
        ("timing", "Time and memory", _timing(entries)),
        *([("fid", "FID", join(*(_fid(*each) for each in distances)))] if distances else []),
        ("settings", "Settings", _settings(entries)),
        ("origin", "Origin and licence", _origin(entries, embedded)),
    ]
    return Template(_data("template.html").decode()).substitute(
        policy=escape(policy),
        title=escape(f"{name} - maisi report"),
        style=Html(_data("report.css").decode()),
        name=escape(name),
        summary=_summary(entries),
        tiles=_tiles(entries, distances),
        notes=tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else "",
        navigation=join(*(tag("a", title, href=f"#{key}") for key, title, _ in sections)),
        cards=join(*(_card(k, each) for k, each in enumerate(entries))),
        embedding=_embedding(entries),
        sections=join(*(_section(key, title, content) for key, title, content in sections if content is not None)),
        data=_json(_viewer_data(entries)),
        payloads=join(
            *(tag("script", Html(text), type="text/plain", id=f"{kind}-{k}") for k, each in enumerate(entries) for kind, text in each.payloads.items()),
            tag("script", Html(base64.b64encode(niivue).decode("ascii")), type="text/plain", id="niivue") if embedded else None,
        ),
        script=script.decode(),
    )


def _json(data: Any) -> str:
    """Return JSON that may stand inside a script element: no character of it can end that element."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _viewer_data(entries: Sequence[Entry]) -> dict[str, Any]:
    present = sorted({value for each in entries for value, _ in each.facts.get("labels", ())})
    vocabulary = maisi()
    colours = {value: label.color if (label := vocabulary.get(value)) else (200, 200, 200) for value in present}
    return {
        "windows": [[name, low, high] for name, low, high in WINDOWS],
        "labels": {str(value): [vocabulary.name_of(value), list(colours[value])] for value in present},
        "samples": [{"id": each.case.id, "kinds": list(each.payloads), **each.facts} for each in entries],
    }


def _section(key: str, title: str, content: Html) -> Html:
    return tag("section", tag("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")


def _summary(entries: Sequence[Entry]) -> Html:
    cases = [each.case for each in entries]
    values = (
        _words(case.model for case in cases),
        _words(case.modality for case in cases),
        _words(f"{format_triple(case.size)} voxels of {_mm(case.spacing)} mm" for case in cases),
        f"finished {_when(max(case.finished for case in cases))}",
    )
    return join(*(tag("span", value) for value in values))


def _words(values: Iterable[object], at_most: int = 3) -> str:
    distinct = list(dict.fromkeys(map(str, values)))
    more = len(distinct) - at_most
    return ", ".join(distinct[:at_most]) + (f" and {more} more" if more > 0 else "")


def _mm(values: Iterable[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def _when(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _tiles(entries: Sequence[Entry], distances: Sequence[tuple[str, Mapping[str, Any]]]) -> Html:
    cases = [each.case for each in entries]
    checked = [case for case in cases if case.passed is not None]
    failed = sum(case.passed is False for case in checked)
    totals = [sum(case.seconds.values()) for case in cases]
    peaks = [case.peak_gib for case in cases if case.peak_gib is not None]
    tiles: list[tuple[str, str, str | None]] = [("Samples", str(len(cases)), None)]
    if checked:
        tiles.append(("Quality check", f"{len(checked) - failed} of {len(checked)} passed", "bad" if failed else None))
    else:
        tiles.append(("Quality check", "not run", None))
    tiles.append(("Time a sample, median", f"{_figure(statistics.median(totals))} s", None))
    if peaks:
        tiles.append(("Peak memory", f"{_figure(max(peaks))} GiB", None))
    for _, data in distances[:1]:
        average = data["fid"].get("average") if isinstance(data.get("fid"), dict) else None
        if _is_number(average):
            tiles.append(("FID, average of planes", _figure(average), None))
    return join(*(tag("div", tag("span", name), tag("strong", value, class_=kind)) for name, value, kind in tiles))


def _figure(value: Any) -> str:
    """Return a number with three or four digits that mean something."""
    if not _is_number(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _size(count: int) -> str:
    """Return bytes in kB or MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _verdict(passed: bool | None) -> Html:
    word, kind = {True: ("pass", "good"), False: ("fail", "bad"), None: ("not checked", "faint")}[passed]
    return tag("span", word, class_=f"verdict {kind}")


def _image(picture: bytes, text: str) -> Html:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        width, height = opened.size
    return tag("img", src=f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}", alt=text, width=width, height=height)


def _card(number: int, entry: Entry) -> Html:
    case = entry.case
    what = "labels" if "image" not in case.made["outputs"] else "image"
    seen = _image(entry.picture, f"Three planes of {case.id}, {what}") if entry.picture else tag("span", "no image", class_="placeholder")
    return tag("li", tag("button", seen, tag("span", tag("span", case.id, class_="id"), _verdict(case.passed), class_="line"),
                         *(tag("span", note, class_="note") for note in entry.notes),
                         type="button", data_sample=number, aria_pressed="false"))  # fmt: skip


def _embedding(entries: Sequence[Entry]) -> Html:
    whole = sum(bool(each.payloads) for each in entries)
    smaller = any(tuple(each.facts["size"]) != tuple(each.facts["full"]) for each in entries if each.payloads)
    text = f"{whole} of {len(entries)} samples are here as volumes that can be scrolled"
    text += f", averaged down to at most {AXIS_LIMIT} voxels an axis. " if smaller else ", voxel for voxel. "
    if whole < len(entries):
        text += "The others are pictures: make the report with a larger --volumes to have more, at about 3 MB each. "
    return tag("p", text + "Figures and files are those of the full volumes.", class_="faint")


# --- quality, time, distances, settings ---------------------------------------------------------------------


def _within(finding: Finding) -> bool | None:
    if finding.value is None or (finding.low is None and finding.high is None):
        return None
    return (finding.low is None or finding.value >= finding.low) and (finding.high is None or finding.value <= finding.high)


def _quality(entries: Sequence[Entry]) -> Html:
    rows = []
    for number, each in enumerate(entries):
        case = each.case
        failures = [finding.text for finding in case.findings if not finding.passed]
        shown = {"volume": "volume", "picture": "picture only", "nothing": "nothing to show"}[each.shown_as]
        rows.append((tag("a", case.id, href="#viewer", data_go=number), case.seed, case.index, _attempt(case), _verdict(case.passed),
                     "; ".join(failures) if failures else "", f"{shown}, {_size(each.bytes)}", "; ".join(each.notes)))  # fmt: skip
    head = ("Sample", "Seed", "Index", "Tries", "Check", "What failed", "In this page", "Notes")
    details = (_findings(number, each.case) for number, each in enumerate(entries))
    return join(_table(head, rows, numbers=(1, 2, 3), caption="Samples and their quality check"), *details)


def _attempt(case: Case) -> object:
    attempt = case.made.get("attempt")
    return attempt + 1 if isinstance(attempt, int) else ""


def _findings(number: int, case: Case) -> Html:
    order = sorted(case.findings, key=lambda finding: (finding.passed, _within(finding) is not False))
    rows = []
    for finding in order:
        inside = _within(finding)
        word, kind = ("fail", "bad") if not finding.passed else ("note", "faint") if inside is False else ("pass", "good")
        rows.append((join(finding.check, tag("small", finding.label) if finding.label else None), tag("span", word, class_=f"verdict {kind}"),
                     "" if finding.value is None else _figure(finding.value), _bounds(finding), _gauge(finding), finding.text))  # fmt: skip
    head = ("Check", "Result", "Value", "Expected", "Range", "In words")
    body = _table(head, rows, numbers=(2,), caption=f"Findings on {case.id}") if rows else tag("p", "This sample was not checked.")
    return tag("article", tag("h3", f"Findings on {case.id}"), body, data_of=number)


def _bounds(finding: Finding) -> str:
    low, high = (None if value is None else _figure(value) for value in (finding.low, finding.high))
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""


def _gauge(finding: Finding) -> Html | None:
    """Draw where a value lies against its bounds: a band, and a mark for the value."""
    if _within(finding) is None or finding.value is None:
        return None
    value = finding.value
    ends = [end for end in (finding.low, finding.high) if end is not None]
    reach = max(ends) - min(ends) or max(abs(value - ends[0]), abs(ends[0]), 1e-9)
    left, right = min(*ends, value) - 0.15 * reach, max(*ends, value) + 0.15 * reach

    def at(place: float | None, otherwise: float) -> float:
        return otherwise if place is None else round((place - left) / (right - left) * 120, 1)

    start, stop, mark = at(finding.low, 0), at(finding.high, 120), at(value, 0)
    return tag("svg", tag("rect", x=0, y=6, width=120, height=2, class_="track"), tag("rect", x=start, y=4, width=round(stop - start, 1),
               height=6, class_="band"), tag("rect", x=round(mark - 1, 1), y=0, width=2, height=14, class_="mark" if _within(finding) else "mark bad"),
               viewBox="0 0 120 14", width=120, height=14, class_="gauge", aria_hidden="true")  # fmt: skip


def _timing(entries: Sequence[Entry]) -> Html:
    cases = [each.case for each in entries]
    used = {stage for case in cases for stage, seconds in case.seconds.items() if seconds > 0}
    stages = [*(stage for stage in STAGES if stage in used), *sorted(used - set(STAGES))]
    longest = max((sum(case.seconds.values()) for case in cases), default=0.0) or 1.0
    peaks = [case.peak_gib for case in cases if case.peak_gib is not None]
    rows = []
    for case in cases:
        total = sum(case.seconds.values())
        parts = [(f"s{k % 6}", case.seconds.get(stage, 0.0) / longest) for k, stage in enumerate(stages)]
        memory = _bar([("memory", case.peak_gib / (max(peaks) or 1))]) if case.peak_gib is not None else ""
        rows.append((case.id, *(_figure(case.seconds.get(stage, 0.0)) for stage in stages), _figure(total), _bar(parts),
                     "" if case.peak_gib is None else _figure(case.peak_gib), memory))  # fmt: skip
    legend = tag("p", *(tag("span", tag("i", class_=f"swatch s{k % 6}"), stage) for k, stage in enumerate(stages)), class_="legend")
    head = ("Sample", *(f"{stage}, s" for stage in stages), "total, s", "Time by stage", "peak, GiB", "Peak memory")
    n = len(stages)
    caption = "Seconds by stage and peak memory of each sample"
    where = _words((_device(case) for case in cases), at_most=2)
    foot = tag("p", f"On {where}. " if where else "", "The peak is that of the whole process up to that sample: on a GPU what torch "
               "allocated there, else resident memory.", class_="faint")  # fmt: skip
    return join(legend, _table(head, rows, numbers=(*range(1, n + 2), n + 3), caption=caption), foot)


def _device(case: Case) -> str:
    environment = case.made.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else None
    if not isinstance(device, dict):
        return ""
    return " ".join(str(device[key]) for key in ("gpu", "name", "dtype") if device.get(key))


def _bar(parts: Iterable[tuple[str, float]]) -> Html:
    drawn, x = [], 0.0
    for kind, share in parts:
        width = round(share * 200, 2)
        if width > 0:
            drawn.append(tag("rect", x=round(x, 2), y=0, width=width, height=12, class_=kind))
        x += width
    return tag("svg", *drawn, viewBox="0 0 200 12", width=200, height=12, preserveAspectRatio="none", class_="bar", aria_hidden="true")


def _fid(name: str, data: Mapping[str, Any]) -> Html:
    planes = data.get("fid")
    planes = {str(key): value for key, value in planes.items() if _is_number(value)} if isinstance(planes, dict) else {}
    intervals, baseline = _by_plane(data.get("ci95")), _by_plane(data.get("baseline"))
    bounds = {key: pair for key in planes if (pair := _pair(intervals.get(key))) is not None}
    least = {key: value for key in planes if _is_number(value := baseline.get(key))}
    top = max([*planes.values(), *(high for _, high in bounds.values()), *least.values(), 1e-9]) * 1.05
    rows = []
    for key, value in planes.items():
        ends = bounds.get(key)
        rows.append((key.upper() if len(key) == 2 else key, _figure(value), f"{_figure(ends[0])} to {_figure(ends[1])}" if ends else "",
                     _figure(least[key]) if key in least else "", _interval(value, ends, least.get(key), top)))  # fmt: skip
    head = ("Plane", "FID", "95 % interval", "real against real", "")
    shown = {"schema", "fid", "warnings", *(["ci95"] if bounds else []), *(["baseline"] if least else [])}
    rest = [pair for key, value in data.items() if key not in shown for pair in _flat(key, value)]
    warnings = data.get("warnings")
    warned = [str(each) for each in warnings] if isinstance(warnings, list) else []
    return tag("article", tag("h3", name), *(tag("p", text, class_="warning") for text in warned),
               _table(head, rows, numbers=(1, 2, 3), caption=f"Distances of {name}") if rows else tag("p", "It holds no FID."),
               _facts(rest) if rest else None)  # fmt: skip


def _by_plane(value: Any) -> Mapping[str, Any]:
    """Return a table by plane, which may lie one key deeper, under `fid`."""
    if not isinstance(value, dict):
        return {}
    inner = value.get("fid")
    return inner if isinstance(inner, dict) else value


def _pair(value: Any) -> tuple[float, float] | None:
    if isinstance(value, dict):
        value = [value.get("low"), value.get("high")]
    if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        return float(value[0]), float(value[1])
    return None


def _interval(value: float, ends: tuple[float, float] | None, least: float | None, top: float) -> Html:
    def at(place: float) -> float:
        return round(max(0.0, place) / top * 260, 1)

    parts = [tag("rect", x=0, y=7, width=260, height=2, class_="track")]
    if ends is not None:
        parts.append(tag("rect", x=at(ends[0]), y=5, width=round(max(1.0, at(ends[1]) - at(ends[0])), 1), height=6, class_="band"))
    if least is not None:
        parts.append(tag("rect", x=at(least), y=1, width=2, height=14, class_="baseline"))
    parts.append(tag("circle", cx=at(value), cy=8, r=4.5, class_="mark"))
    return tag("svg", *parts, viewBox="0 0 265 16", width=265, height=16, class_="gauge", aria_hidden="true")


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _flat(f"{key} {inner}", each)
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for number, each in enumerate(value):
            yield from _flat(f"{key} {number}", each)
    else:
        yield key.replace("_", " "), _value(value)


def _value(value: Any) -> str:
    """Return a value of JSON as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return show(tuple(value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return show(value) if value != "" else "empty"


def _settings(entries: Sequence[Entry]) -> Html:
    """Return the settings that were chosen by anybody, and, folded, those left at their defaults."""
    found: dict[str, list[tuple[str, str]]] = {}
    for each in entries:
        for key, entry in each.case.made["settings"].items():
            found.setdefault(key, []).append((_value(entry["value"]), str(entry["origin"])))
    chosen, left = [], []
    for key in sorted(found):
        values, origins = (list(dict.fromkeys(column)) for column in zip(*found[key], strict=True))
        counted = Counter(value for value, _ in found[key])
        text = values[0] if len(values) == 1 else f"differs: {_words(f'{value} ({counted[value]})' for value in values)}"
        (left if origins == ["default"] else chosen).append((key, text, _words(origins)))
    head = ("Setting", "Value", "Origin")
    return join(
        _table(head, chosen, caption="Settings that were chosen"),
        tag("details", tag("summary", f"{len(left)} settings at their defaults"), _table(head, left, caption="Settings at their defaults")) if left else None,
    )


def _origin(entries: Sequence[Entry], embedded: bool) -> Html:
    cases = [each.case for each in entries]
    models: dict[str, Mapping[str, Any]] = {}
    for case in cases:
        models.setdefault(json.dumps(case.made["model"], sort_keys=True), case.made["model"])
    parts: list[Html] = [tag("p", "Everything shown here is synthetic: made by a generative model, not acquired from a patient. It is not for "
                             "diagnosis, and says so in the header of each file.")]  # fmt: skip
    for model in models.values():
        use = {True: "commercial use allowed", False: "no commercial use"}.get(model.get("commercial"))  # type: ignore[arg-type]
        rows = [("model", model.get("name")), ("licence of its weights", ", ".join(str(each) for each in (model.get("licence"), use) if each))]
        weights = model.get("weights")
        for weight in weights if isinstance(weights, list) else []:
            if isinstance(weight, dict):
                rows.append((f"weights, {weight.get('part')}", join(str(weight.get("file")), tag("code", weight.get("sha256") or "not hashed"))))
        parts.append(_facts(rows))
    tools = _words(f"{_get(case, 'tool', 'name')} {_get(case, 'tool', 'version')}" for case in cases)
    systems = _words(f"Python {_get(case, 'environment', 'python')} on {_get(case, 'environment', 'platform')}" for case in cases)
    packages = _words(", ".join(f"{name} {version}" for name, version in _packages(case)) for case in cases)
    parts.append(_facts([("made with", tools), ("on", systems), ("packages", packages)]))
    parts += (_files(number, case) for number, case in enumerate(cases))
    if embedded:
        licence = tag("pre", _data("niivue.LICENSE.txt").decode(), tabindex="0")
        parts.append(tag("details", tag("summary", "Licences of the 3D view (NiiVue) and what is bundled into it"), licence))
    return join(*parts)


def _get(case: Case, *keys: str) -> Any:
    value: Any = case.made
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _packages(case: Case) -> list[tuple[str, str]]:
    found = _get(case, "environment", "packages")
    return sorted((str(key), str(value)) for key, value in found.items()) if isinstance(found, dict) else []


def _files(number: int, case: Case) -> Html:
    rows = [("mask", _mask(case)), *(("note", note) for note in case.notes)]
    for kind, entry in sorted(case.made["outputs"].items()):
        rows.append((kind, join(str(entry["file"]), tag("code", entry["sha256"]))))
    return tag("article", tag("h3", f"Files of {case.id}"), _facts([(name, value) for name, value in rows if value]), data_of=number)


def _mask(case: Case) -> str:
    """Return where the mask came from, and what else is recorded of it but the list of its ids."""
    about = case.made.get("mask")
    if not isinstance(about, dict):
        return ""
    return "; ".join(f"{name} {value}" for key, each in about.items() if key != "ids" for name, value in _flat(key, each))
