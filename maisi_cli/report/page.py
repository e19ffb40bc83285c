"""The page: sections of a report as HTML.

Whatever comes from a record is text: `tag` escapes it, and the Content-Security-Policy runs nothing but the scripts of
`data/report/`. The viewer in `report.js` gets its facts as JSON and the volumes as base64, in script elements that do not run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from ..anatomy import maisi
from ..geometry import format_triple
from ..preview import LUNG_HU, SOFT_TISSUE_HU
from ..quality import Finding
from ..settings import show
from .html import Html, join, tag
from .samples import AXIS_LIMIT, Case, Entry

WINDOWS = (
    ("Soft tissue", *SOFT_TISSUE_HU),
    ("Lung", *LUNG_HU),
    ("Bone", -500.0, 1300.0),
    ("Brain", 0.0, 80.0),
)
"""Names and HU ranges of the window presets of CT."""
STAGES = ("mask", "denoise", "decode", "save")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = (), caption: str) -> Html:
    """Return a table; the first cell of a row is its header, `numbers` are the columns aligned to the right."""
    right = frozenset(numbers)

    def cells(row: Sequence[object]) -> Iterator[Html]:
        for k, cell in enumerate(row):
            yield tag("td" if k else "th", cell, scope=None if k else "row", class_="number" if k in right else None)

    top = tag("tr", *(tag("th", name, scope="col", class_="number" if k in right else None) for k, name in enumerate(head)))
    body = (tag("tr", *cells(row)) for row in rows)
    title = tag("caption", caption, class_="unseen")
    table = tag("table", title, tag("thead", top), tag("tbody", *body), class_="many" if len(head) > 4 else None)
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _facts(rows: Iterable[tuple[str, object]]) -> Html:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in rows))


def _data(name: str) -> bytes:
    return (files("maisi_cli") / "data" / "report" / name).read_bytes()


@cache
def _script_hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')}'"


def _packed(content: bytes) -> Html:
    """Return bytes as the page unpacks them: compressed, in base64."""
    return Html(base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii"))


def compose(name: str, entries: Sequence[Entry], distances: Sequence[tuple[str, Mapping[str, Any]]], notes: Sequence[str]) -> str:
    """Return the page of the run called `name`, with the results of `maisi fid` and notes on what could not be read."""
    embedded = any(each.payloads for each in entries)
    script, niivue = _data("report.js"), _data("niivue.umd.js") if embedded else b""
    hashes = [_script_hash(script), *([_script_hash(niivue)] if embedded else [])]
    policy = [
        "default-src 'none'", f"script-src {' '.join(hashes)}", "style-src 'unsafe-inline'", "img-src data: blob:",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    sections = [
        ("viewer", "Samples", None),
        ("quality", "Quality", _quality(entries)),
        ("timing", "Time and memory", _timing(entries)),
        *([("fid", "FID", join(*(_fid(*each) for each in distances)))] if distances else []),
        ("settings", "Settings", _settings(entries)),
        ("origin", "Origin and licence", _origin(entries, embedded)),
    ]
    return Template(_data("template.html").decode()).substitute(
        policy=escape("; ".join(policy)),
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
            *(
                tag("script", Html(text), type="text/plain", id=f"{kind}-{k}")
                for k, each in enumerate(entries)
                for kind, text in each.payloads.items()
            ),
            tag("script", _packed(niivue), type="text/plain", id="niivue") if embedded else None,
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
        _words((f"{format_triple(case.size)} voxels of {_mm(case.spacing)} mm" for case in cases), at_most=2),
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
        text += "The others are pictures: make the report with a larger --volumes to have more, at up to 3 MB each. "
    return tag("p", text + "Figures and files are those of the full volumes.", class_="faint")


# --- quality, time, distances, settings ---------------------------------------------------------------------


def _within(finding: Finding) -> bool | None:
    if finding.value is None or (finding.low is None and finding.high is None):
        return None
    return (finding.low is None or finding.value >= finding.low) and (finding.high is None or finding.value <= finding.high)


def _quality(entries: Sequence[Entry]) -> Html:
    rows: list[tuple[object, ...]] = []
    for number, each in enumerate(entries):
        case = each.case
        failures = [finding.text for finding in case.findings if not finding.passed]
        shown = {"volume": "volume", "picture": "picture only", "nothing": "nothing to show"}[each.shown_as]
        rows.append((tag("a", case.id, href="#viewer", data_go=number), case.seed, case.index, _attempt(case), _verdict(case.passed),
                     "; ".join(failures) if failures else "", f"{shown}, {_size(each.bytes)}", "; ".join(each.notes)))  # fmt: skip
    head = ["Sample", "Seed", "Index", "Tries", "Check", "What failed", "In this page", "Notes"]
    for k in (7, 5):  # columns in which no sample has anything
        if not any(row[k] for row in rows):
            rows = [row[:k] + row[k + 1 :] for row in rows]
            del head[k]
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
        name = join(finding.check, tag("small", finding.label) if finding.label else None)
        value = "" if finding.value is None else _figure(finding.value)
        rows.append((name, tag("span", word, class_=f"verdict {kind}"), value, _bounds(finding), _gauge(finding), finding.text))
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
    parts = (
        tag("rect", x=0, y=6, width=120, height=2, class_="track"),
        tag("rect", x=start, y=4, width=round(stop - start, 1), height=6, class_="band"),
        tag("rect", x=round(mark - 1, 1), y=0, width=2, height=14, class_="mark" if _within(finding) else "mark bad"),
    )
    return tag("svg", *parts, viewBox="0 0 120 14", width=120, height=14, class_="gauge", aria_hidden="true")


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
    """Draw one result of `maisi fid`: a table by plane of what it holds by plane, and the rest, folded, as names and values."""
    fid = {key: value for key, value in _table_of(data, "fid").items() if _is_number(value)}
    intervals, halves, kid = (_table_of(data, key) for key in ("ci95", "baseline", "kid"))
    scaled = halves.get("at_these_sizes")
    sized: Mapping[str, Any] = scaled if isinstance(scaled, dict) else {}
    ends = {key: pair for key in fid if (pair := _pair(intervals.get(key))) is not None}
    marks = {key: value for key in fid if _is_number(value := (sized or halves).get(key))}
    top = 1.05 * max([*fid.values(), *(high for _, high in ends.values()), *marks.values(), 1e-9])
    columns: list[tuple[str, list[object]]] = [
        ("FID", [_figure(value) for value in fid.values()]),
        ("95 % interval", [f"{_figure(ends[key][0])} to {_figure(ends[key][1])}" if key in ends else "" for key in fid]),
        ("KID", [_kid(kid.get(key)) for key in fid]),
        ("halves of real", [_figure(halves[key]) if _is_number(halves.get(key)) else "" for key in fid]),
        ("real against real at these sizes", [_figure(sized[key]) if _is_number(sized.get(key)) else "" for key in fid]),
        ("FID, its interval, and real against real", [_interval(value, ends.get(key), marks.get(key), top) for key, value in fid.items()]),
    ]
    columns = [(head, cells) for head, cells in columns if any(cells)]
    head = ("Plane", *(head for head, _ in columns))
    rows = list(zip((key.upper() if len(key) == 2 else key for key in fid), *(cells for _, cells in columns), strict=True))
    table = _table(head, rows, numbers=range(1, len(head) - 1), caption=f"Distances of {name}") if rows else tag("p", "It holds no FID.")
    left = {"schema", "warnings", "notes"} | set(fid and ["fid"])
    by_plane = {"ci95": set(ends), "kid": set(fid), "baseline": {*fid, "at_these_sizes"}}
    rest: list[tuple[str, str]] = []
    for key, value in data.items():
        if key not in left:
            inner = (
                {k: each for k, each in value.items() if k not in by_plane[key]} if key in by_plane and isinstance(value, dict) else value
            )
            rest += _flat(key, inner)
    said = [tag("p", text, class_=kind) for key, kind in (("warnings", "warning"), ("notes", "faint")) for text in _texts(data.get(key))]
    more = tag("details", tag("summary", "Volumes, slices, features and the rest"), _facts(rest)) if rest else None
    return tag("article", tag("h3", name), *said, table, more)


def _table_of(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else []


def _kid(value: Any) -> str:
    if isinstance(value, dict) and _is_number(value.get("value")):
        error = value.get("error")
        return _figure(value["value"]) + (f" ± {_figure(error)}" if _is_number(error) else "")
    return _figure(value) if _is_number(value) else ""


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
    chosen: list[tuple[str, str, str]] = []
    left: list[tuple[str, str, str]] = []
    for key in sorted(found):
        values, origins = (list(dict.fromkeys(column)) for column in zip(*found[key], strict=True))
        counted = Counter(value for value, _ in found[key])
        text = values[0] if len(values) == 1 else _words((f"{value} ({_samples(counted[value])})" for value in values), at_most=4)
        (left if origins == ["default"] else chosen).append((key, text, _words(origins)))
    head = ("Setting", "Value", "Origin")
    return join(
        _table(head, chosen, caption="Settings that were chosen"),
        tag("details", tag("summary", f"{len(left)} settings at their defaults"), _table(head, left, caption="Settings at their defaults"))
        if left
        else None,
    )


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count != 1 else ''}"


def _origin(entries: Sequence[Entry], embedded: bool) -> Html:
    cases = [each.case for each in entries]
    models: dict[str, Mapping[str, Any]] = {}
    for case in cases:
        models.setdefault(json.dumps(case.made["model"], sort_keys=True), case.made["model"])
    notice = "Everything shown here is synthetic: made by a generative model, not acquired from a patient. "
    notice += "It is not for diagnosis, and says so in the header of each file."
    parts = [tag("p", notice)]
    for model in models.values():
        use = {True: "commercial use allowed", False: "no commercial use"}.get(model.get("commercial"))  # type: ignore[arg-type]
        rows = [
            ("model", model.get("name")),
            ("licence of its weights", ", ".join(str(each) for each in (model.get("licence"), use) if each)),
        ]
        weights = model.get("weights")
        for weight in weights if isinstance(weights, list) else []:
            if isinstance(weight, dict):
                rows.append(
                    (f"weights, {weight.get('part')}", join(str(weight.get("file")), tag("code", weight.get("sha256") or "not hashed")))
                )
        parts.append(_facts(rows))
    tools = _words(f"{case.get('tool', 'name')} {case.get('tool', 'version')}" for case in cases)
    systems = _words(f"Python {case.get('environment', 'python')} on {case.get('environment', 'platform')}" for case in cases)
    packages = _words(", ".join(f"{name} {version}" for name, version in _packages(case)) for case in cases)
    parts.append(_facts([("made with", tools), ("on", systems), ("packages", packages)]))
    parts += (_files(number, case) for number, case in enumerate(cases))
    if embedded:
        licence = tag("pre", _data("niivue.LICENSE.txt").decode(), tabindex="0")
        parts.append(tag("details", tag("summary", "Licences of the 3D view (NiiVue) and what is bundled into it"), licence))
    return join(*parts)


def _packages(case: Case) -> list[tuple[str, str]]:
    found = case.get("environment", "packages")
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
