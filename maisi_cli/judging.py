"""Cases on disk: which files of a folder belong together, and what the quality checks say of each, many at a time."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .events import Note, OnEvent, Step, ignore

if TYPE_CHECKING:
    from .quality import Finding, Verdict
    from .volumes import Mask, Volume

IMAGE_ENDS = ("_image", "_img", "_ct", "_mr", "_0000")
LABEL_ENDS = ("_label", "_labels", "_seg", "_segmentation", "_mask", "-label", "-seg")
IMAGE_NAMES = ("image", "img", "ct", "mr", "mri")
LABEL_NAMES = ("label", "labels", "seg", "segmentation", "segmentations", "mask")
LABEL_FOLDER = re.compile(r"^(labels|masks|segmentations)(Tr|Ts|Tst|Val)?$")
OTHER_CHANNEL = re.compile(r"_0(?!000$)\d{3}$")
PARALLEL_FROM = 16
"""With fewer cases one process is faster than starting several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An image and the label map that belongs to it; either may be missing. `typed` is the file that was named itself.

    `label` may be a folder with a file per class, as TotalSegmentator writes it.
    """

    id: str
    image: Path | None
    label: Path | None
    typed: Path | None = None


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


# --- which files belong together ----------------------------------------------------------------


def stem(path: Path) -> str:
    """Return the name of a NIfTI file without its ending."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def find_cases(paths: Iterable[Path], *, label_dir: Path | None = None) -> list[Case]:
    """Return the cases that files and folders name or hold, in the order of their names.

    Images and label maps are paired by name: `a_image` and `a_label` (also `_ct`, `_seg`, `_mask` and the like, or `a` and
    `a_seg`), nnU-Net's `imagesTr/a_0000` and `labelsTr/a`, TotalSegmentator's `ct` beside `segmentations`, one file or a
    folder with a file per class; with `label_dir`, `a` in the one folder and in the other. Each may lack the other. Raises
    `UsageError` for what does not exist and for a folder without NIfTI files.
    """
    if label_dir is not None and not label_dir.is_dir():
        raise UsageError(f"there is no folder {label_dir}", hint="--label-dir names the folder of the label maps")
    cases: dict[Path, Case] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(each for each in path.rglob("*.nii*") if _is_nifti(each) and not _hidden(each.relative_to(path)))
            if not found:
                raise UsageError(f"{path} holds no NIfTI file", hint="name another folder, or the files themselves")
            for case in sorted(_paired(found, path, label_dir), key=lambda case: (_key(case).parent, case.id)):
                cases.setdefault(_key(case), case)
        elif path.is_file():
            case = _around(path, label_dir)
            cases.setdefault(_key(case), case)
        else:
            raise UsageError(f"there is no file or folder {path}", hint="check the path")
    return _distinct(list(cases.values()))


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz")) and path.is_file()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _key(case: Case) -> Path:
    return (case.image or case.label or Path()).absolute()


def _base(path: Path) -> str:
    """Return what an image's and a label map's name have in common."""
    name = stem(path)
    for end in (*IMAGE_ENDS, *LABEL_ENDS):
        if name.endswith(end) and len(name) > len(end):
            return name.removesuffix(end)
    return name


def _is_label(path: Path) -> bool:
    """Say whether a file is a label map by its name or that of its folder."""
    name = stem(path)
    return name.endswith(LABEL_ENDS) or name in LABEL_NAMES or bool(LABEL_FOLDER.match(path.parent.name))


def _paired(files: Sequence[Path], root: Path, label_dir: Path | None) -> Iterator[Case]:
    inside = None if label_dir is None else label_dir.absolute()
    images = [each for each in files if not (_is_label(each) if inside is None else inside in each.absolute().parents)]
    used: set[Path] = set()
    for image in images:
        if OTHER_CHANNEL.search(stem(image)) and image.with_name(image.name.replace(stem(image), _channel_0(image))) in files:
            continue  # another channel of the same case
        label = _label_of(image, label_dir, root)
        used.update(_inside(label))
        yield Case(id=_id(image), image=image, label=label)
    if label_dir is None:
        folders = {each.parent for each in files if _is_label(each) and each not in used and _per_class(each.parent)}
        for folder in sorted(folders):
            yield Case(id=folder.parent.name, image=None, label=folder)
        for each in files:
            if _is_label(each) and each not in used and each.parent not in folders:
                yield Case(id=_id(each), image=None, label=each)


def _channel_0(image: Path) -> str:
    return OTHER_CHANNEL.sub("_0000", stem(image))


def _inside(label: Path | None) -> list[Path]:
    if label is None:
        return []
    return [each for each in label.iterdir() if _is_nifti(each)] if label.is_dir() else [label]


def _per_class(folder: Path) -> bool:
    """Say whether a folder holds a file per class of one case."""
    return folder.name == "segmentations" and any(_file(folder.parent, name) for name in IMAGE_NAMES)


def _file(folder: Path, name: str) -> Path | None:
    return next((each for kind in (".nii.gz", ".nii") if (each := folder / f"{name}{kind}").is_file()), None)


def _label_of(image: Path, label_dir: Path | None, root: Path) -> Path | None:
    """Return the label map of an image."""
    base, name, folder = _base(image), stem(image), image.parent
    places: list[tuple[Path, str]] = []
    if label_dir is not None:
        sub = label_dir / folder.relative_to(root) if folder.is_relative_to(root) else label_dir
        places += [(each, f"{root}{end}") for each in (sub, label_dir) for root in (name, base) for end in ("", *LABEL_ENDS)]
        return next((found for place in places if (found := _file(*place))), None)
    places += [(folder, f"{start}{end}") for start in dict.fromkeys((base, name)) for end in LABEL_ENDS]
    if name in IMAGE_NAMES:
        places += [(folder, each) for each in LABEL_NAMES]
    beside = re.sub(r"^(images?|imgs?)(?=$|[A-Z_])", "labels", folder.name)
    if beside != folder.name:
        places += [(folder.parent / each, start) for each in (beside, beside.replace("labels", "masks")) for start in (base, name)]
    found = next((each for place in places if (each := _file(*place)) and each != image), None)
    if (
        found is None
        and name in IMAGE_NAMES
        and (folder / "segmentations").is_dir()
        and any(map(_is_nifti, (folder / "segmentations").iterdir()))
    ):
        return folder / "segmentations"
    return found


def _around(path: Path, label_dir: Path | None) -> Case:
    """Return the case of one file that was named."""
    if not _is_label(path) or label_dir is not None:
        return Case(id=_base(path), image=path, label=_label_of(path, label_dir, path.parent), typed=path)
    base, folder = _base(path), path.parent
    places = [(folder, f"{base}{end}") for end in (*IMAGE_ENDS, "")]
    if stem(path) in LABEL_NAMES:
        places += [(folder, each) for each in IMAGE_NAMES]
    if LABEL_FOLDER.match(folder.name):
        images = folder.parent / LABEL_FOLDER.sub(r"images\2", folder.name)
        places += [(images, f"{base}{end}") for end in ("_0000", "", "_image")]
    image = next((each for place in places if (each := _file(*place)) and each != path), None)
    return Case(id=_base(path), image=image, label=path, typed=path)


def _id(path: Path) -> str:
    """Return a case's name: that of its file, or of its folder where the file's is `ct`, `segmentations` and the like."""
    base = _base(path)
    return path.absolute().parent.name if base in (*IMAGE_NAMES, *LABEL_NAMES) else base


def _distinct(cases: list[Case]) -> list[Case]:
    """Put the folder before the names that several cases share."""
    seen: dict[str, int] = {}
    for case in cases:
        seen[case.id] = seen.get(case.id, 0) + 1
    return [
        case if seen[case.id] == 1 else replace(case, id=f"{(case.image or case.label or Path()).absolute().parent.name}/{case.id}")
        for case in cases
    ]


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
    for path in sorted(filter(_is_nifti, folder.iterdir())):
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
