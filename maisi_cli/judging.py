"""What the quality checks say of cases on disk, many at a time."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import IMAGE_ENDS, Case, is_nifti
from .errors import UsageError
from .events import Note, OnEvent, Step, ignore
from .files import stem

if TYPE_CHECKING:
    from .quality import Finding, Verdict
    from .volumes import Mask, Volume

PARALLEL_FROM = 16
"""With fewer cases one process is faster than starting several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How cases are judged: the vocabulary of their label maps, the modality (None: the record's, else ct), and the checks."""

    labels: str = "maisi"
    modality: str | None = None
    required: tuple[str, ...] = ()
    checks: tuple[str, ...] | None = None
    compat: bool = False
    picture: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the checks say of a case, what else must be said of it, and its small picture (PNG) where one was asked for."""

    case: Case
    verdict: Verdict
    notes: tuple[str, ...] = ()
    picture: bytes | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        """Whether checks looked at the case and every finding passed."""
        return bool(self.verdict.findings) and self.verdict.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the case as `qc --json` shows it."""
        return {"id": self.case.id, **self.verdict.as_dict(), "passed": self.passed}


# --- reading and judging -------------------------------------------------------------------------


def load(case: Case, terms: Terms) -> tuple[Volume | None, Mask | None, list[str], dict[str, Any]]:
    """Read a case: its image, its label map in the MAISI vocabulary, what is to be said of it, and what its record knows.

    What the record knows are arguments of `quality.check`. Raises `UsageError` for a file that cannot be read.
    """
    from .catalog import modality as find_modality
    from .volumes import read_image

    notes: list[str] = []
    record = _record(case, notes)
    kind = find_modality(terms.modality or str(record.get("modality", "ct"))).name
    image = read_image(case.image, modality=kind) if case.image else None
    label = case.label
    unnamed = case.image is not None and label is None and not stem(case.image).endswith(IMAGE_ENDS)
    if unnamed and image is not None and case.image is not None and _looks_like_labels(case.image, image):
        image, label = None, case.image
    mask, stored = _read_label(label, terms.labels, notes) if label else (None, None)
    known = {**_known(record, mask if mask is not None else image), "stored": stored}
    return image, mask, notes, known


def _looks_like_labels(path: Path, image: Volume) -> bool:
    """Say whether a file holds labels: its header says so, or what should be CT holds whole numbers of 0..255 alone."""
    import numpy as np

    from .volumes import is_label_map

    if is_label_map(path):
        return True
    values = image.array
    return bool(image.modality.startswith("ct") and values.min() >= 0 and values.max() <= 255 and np.array_equal(values, np.rint(values)))


def _read_label(path: Path, labels: str, notes: list[str]) -> tuple[Mask, str]:
    from .masks import map_labels
    from .volumes import read_mask, stored_type

    def hear(event: Any) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    if path.is_dir():
        return _read_classes(path, "totalsegmentator" if labels == "maisi" else labels, notes), "uint8"
    mask = read_mask(path)
    return (mask if labels == "maisi" else map_labels(mask, labels, on_event=hear)), stored_type(path)


def _read_classes(folder: Path, labels: str, notes: list[str]) -> Mask:
    """Return one label map of a folder with a file per class; where two overlap the later name stands."""
    import numpy as np

    from .anatomy import remap_table
    from .volumes import read_mask

    remap = remap_table(labels)
    ids = {name: remap.pairs[value] for value, name in remap.names.items() if value in remap.pairs}
    whole: Mask | None = None
    strange = []
    for path in sorted(filter(is_nifti, folder.iterdir())):
        if stem(path) not in ids:
            strange.append(stem(path))
            continue
        one = read_mask(path)
        whole = replace(one, array=np.zeros_like(one.array)) if whole is None else whole
        if one.array.shape != whole.array.shape:
            raise UsageError(f"the files of {folder} have different sizes", hint="they should be the classes of one case")
        whole.array[one.array > 0] = ids[stem(path)]
    if whole is None:
        raise UsageError(f"{folder} holds no class of {labels}", hint="name their vocabulary with --labels")
    if strange:
        notes.append(f"{len(strange)} files of {folder.name} are no class that MAISI has: {', '.join(strange[:6])}")
    return whole


def _record(case: Case, notes: list[str]) -> dict[str, Any]:
    from . import record
    from .volumes import record_beside

    path = record_beside(case.image or case.label or Path())
    if path is None:
        return {}
    try:
        found = record.read(path)
    except UsageError as error:
        notes.append(f"{error.message}: it is left out")
        return {}
    return found if found.get("id") in (None, case.id.rpartition("/")[2]) else {}


def _known(record: dict[str, Any], item: Volume | Mask | None) -> dict[str, Any]:
    from .quality import chosen_organs, tile_planes

    values = {name: each.get("value") for name, each in record.get("settings", {}).items()}
    known: dict[str, Any] = {
        "own_mask": (record.get("mask") or {}).get("source") == "file",
        "chosen": chosen_organs(values.get("anatomy_size") or ()),
    }
    if values.get("decoder") == "window" and values.get("window") and item is not None:
        known["tiles"] = tile_planes(item.geometry.size, values["window"], float(values.get("overlap") or 0))
    return known


def judge(case: Case, terms: Terms) -> Judged:
    """Read a case and run the checks on it.

    A file that cannot be read is a finding (`readable`), unless it was named itself: then `UsageError` is raised.
    """
    from .quality import Verdict, check
    from .quality.findings import judged

    try:
        image, mask, notes, known = load(case, terms)
        verdict = check(image, mask, checks=terms.checks, required=terms.required, compat=terms.compat, **known)
    except UsageError as error:
        if case.typed is not None and str(case.typed) in error.message:
            raise
        finding = judged("readable", None, None, error.message)
        return Judged(case=case, verdict=Verdict(findings=(finding,)))
    if not verdict.findings:
        notes.append("no check applies to it, so it did not pass")
    elif mask is None:
        notes.append("no label map beside it, so only its values were checked")
    elif image is None:
        notes.append("no image beside it, so only its labels were checked")
    picture = _picture(image, mask, case.id) if terms.picture else None
    return Judged(case=case, verdict=verdict, notes=tuple(notes), picture=picture)


def _picture(image: Volume | None, mask: Mask | None, title: str) -> bytes:
    from PIL import Image

    from .preview import draw

    drawn = draw(image, mask, title=title)
    width = 640
    small = drawn.resize((width, round(drawn.height * width / drawn.width)), Image.Resampling.BOX, reducing_gap=2)
    buffer = io.BytesIO()
    small.quantize(96, method=Image.Quantize.FASTOCTREE).save(buffer, format="PNG")
    return buffer.getvalue()


def judge_all(cases: Sequence[Case], terms: Terms, *, jobs: int = 0, on_event: OnEvent = ignore) -> Iterator[Judged]:
    """Judge cases in their order, in `jobs` processes (0: one per core, and one in all for a few cases)."""
    workers = jobs or (min(os.cpu_count() or 1, len(cases)) if len(cases) >= PARALLEL_FROM else 1)
    work = partial(judge, terms=terms)
    if workers == 1:
        for done, case in enumerate(cases, 1):
            yield work(case)
            on_event(Step(stage="qc", done=done, total=len(cases)))
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for done, found in enumerate(pool.map(work, cases), 1):
            yield found
            on_event(Step(stage="qc", done=done, total=len(cases)))
    finally:
        pool.shutdown(cancel_futures=True)


def with_findings(one: Judged, findings: Iterable[Finding]) -> Judged:
    """Return a judged case with more findings."""
    return replace(one, verdict=replace(one.verdict, findings=(*one.verdict.findings, *findings)))


def as_csv(cases: Iterable[Judged]) -> str:
    """Return a table with one row per finding."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["id", "check", "label", "value", "low", "high", "passed", "informative", "text"])
    for one in cases:
        for found in one.verdict.findings:
            table.writerow([one.case.id, found.check, found.label or "", *(_number(v) for v in (found.value, found.low, found.high)),
                            str(found.passed).lower(), str(found.informative).lower(), found.text])  # fmt: skip
    return buffer.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
