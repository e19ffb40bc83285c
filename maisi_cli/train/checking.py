"""`data check`: everything that is wrong with the data of a list, found before hours are spent on it."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..catalog import ModelSpec
from ..catalog import modality as find_modality
from ..catalog import model as find_model
from ..errors import UsageError
from ..events import OnEvent, Stage, Step, ignore
from ..geometry import Size, format_triple
from ..quality import Context, laterality
from ..record import sha256_of
from ..volumes import Mask, Volume, orientation_doubt, read_image, read_mask, require_same_grid, stored_type
from .encoding import FACTOR, KNOWN_LABELS, Encoding, require_spacing, strange_labels, unknown_labels
from .lists import FIELDS, FILES, HELD_OUT, Case, Row, all_rows, id_of

PARALLEL_FROM = 8
"""From how many cases on several processes look at them."""
AIR_BELOW = -200
"""HU that some voxel of a CT lies below: lung, air, fat beyond doubt; MR has no such values."""
HIGHEST_HU = 32000
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with a case, or with the whole list (`case` None); `fix` is the way out.

    The `severity` is `error` for what spoils training, `warning` for what may.
    """

    check: str
    severity: str
    case: str | None
    text: str
    fix: str

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON shows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one process saw of a case: findings, and what is compared with other cases.

    `content` is the SHA-256 of the image (of the latent where there is none), `held_out` says whether the case is kept from
    training, `patient` whose image it is.
    """

    id: str
    where: str
    findings: tuple[Finding, ...]
    content: str | None = None
    patient: str = ""
    section: str = "training"
    fold: int | None = None
    vae_sha256: str | None = None
    channels: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings on a list, those on the whole list last."""

    cases: int
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return the report as `data check --json` shows it."""
        return {"cases": self.cases, "findings": [each.as_dict() for each in self.findings], "passed": self.passed}


def check_lists(
    lists: Sequence[str | Path], *, bases: Sequence[str | Path] = (), model: str = "nano-ct", held_out: int = HELD_OUT, jobs: int = 0,
    on_event: OnEvent = ignore,
) -> Report:  # fmt: skip
    """Check every case of one list or several, training and testing, in `jobs` processes (0: one per core), then them together.

    `model` is the one that is to be trained. Raises `UsageError` only for files that are no list.
    """
    spec = find_model(model)
    rows = all_rows(lists, bases)
    on_event(Stage(name="check", detail=f"{len(rows)} cases"))
    seen = list(_all_seen(rows, spec, jobs, on_event))
    findings = [finding for one in seen for finding in one.findings]
    findings += [*_same_ids(seen), *_copies(seen, held_out), *_patients(seen, held_out), *_vaes(seen), *_folds(seen, held_out)]
    return Report(cases=len(rows), findings=tuple(findings))


def _all_seen(rows: Sequence[Row], spec: ModelSpec, jobs: int, on_event: OnEvent) -> Iterator[Seen]:
    workers = jobs or (min(os.cpu_count() or 1, len(rows)) if len(rows) >= PARALLEL_FROM else 1)
    work: Callable[[Row], Seen] = partial(look_at, spec=spec)
    if workers == 1:
        for done, row in enumerate(rows, 1):
            yield work(row)
            on_event(Step(stage="check", done=done, total=len(rows)))
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for done, one in enumerate(pool.map(work, rows), 1):
            yield one
            on_event(Step(stage="check", done=done, total=len(rows)))
    finally:
        pool.shutdown(cancel_futures=True)


# --- one case -----------------------------------------------------------------------------------


def look_at(row: Row, spec: ModelSpec) -> Seen:
    """Look at one entry of a list and at its files. Never raises for what is wrong with them."""
    try:
        name = id_of(row)
    except UsageError as error:
        return Seen(id=row.where, where=row.where, findings=(_finding("list", row.where, error),))
    findings: list[Finding] = []
    case = _case(row, name, findings)
    image, mask = _image(case, findings), None
    if case.label is not None and (case.latent is None or case.label.suffix != ".npy"):
        mask = _label(case, findings)
    if image is not None and mask is not None:
        _collect(findings, "grid", case.id, partial(require_same_grid, image, mask))
    if image is not None:
        findings += [*_modality(case, image), *_size(case, image.geometry.size, spec)]
        if case.spacing_mm is not None:
            _collect(findings, "spacing", case.id, partial(require_spacing, case.spacing_mm, image.geometry))
    if mask is not None:
        findings += _sides(case, mask)
    channels = _latent(case, mask, spec, findings) if case.latent is not None else None
    source = case.image or case.latent
    return Seen(
        id=case.id, where=row.where, findings=tuple(findings), content=_hash(source), patient=patient_of(case), section=case.section,
        fold=case.fold, vae_sha256=case.vae_sha256, channels=channels,
    )  # fmt: skip


def _error(check: str, case: str | None, *, text: str, fix: str) -> Finding:
    return Finding(check=check, severity="error", case=case, text=text, fix=fix)


def _warning(check: str, case: str | None, *, text: str, fix: str) -> Finding:
    return Finding(check=check, severity="warning", case=case, text=text, fix=fix)


def _finding(check: str, case: str, error: UsageError) -> Finding:
    return _error(check, case, text=error.message, fix=error.hint or "correct the list")


def _collect(findings: list[Finding], check: str, case: str, work: Callable[[], Any]) -> Any:
    """Return what `work` returns; where it raises `UsageError`, keep that as a finding and return None."""
    try:
        return work()
    except UsageError as error:
        findings.append(_finding(check, case, error))
        return None


def _hash(path: Path | None) -> str | None:
    try:
        return sha256_of(path) if path is not None else None
    except OSError:  # it is a finding already: it could not be read
        return None


def _case(row: Row, name: str, findings: list[Finding]) -> Case:
    """Return the case of an entry, each field that it says wrongly a finding and None."""
    values, fields = dict(row.values), dict(FIELDS)
    if "image" in values and "spacing" not in values:
        del fields["spacing_mm"]  # the header says it, if the image can be read
    if not {"image", "latent"} & set(values):
        text = f"{row.where} names neither image nor latent"
        findings.append(_error("list", name, text=text, fix="name one of them, or take the case out of the list"))
    for key in FILES:
        if isinstance(values.get(key), str) and not (row.base / values[key]).is_file():
            text = f"the {key} {values.pop(key)} does not exist"
            findings.append(_error(key, name, text=text, fix="correct the path in the list, or make the file"))
    there = replace(row, values=values)
    read: dict[str, Any] = dict.fromkeys(FIELDS)
    read |= {field: _collect(findings, "list", name, partial(reader, there)) for field, reader in fields.items()}
    vae, extra = values.get("vae_sha256"), {key: values[key] for key in ("patient",) if key in values}
    return Case(id=name, section=row.section, vae_sha256=str(vae) if vae is not None else None, extra=extra, **read)


def _image(case: Case, findings: list[Finding]) -> Volume | None:
    if case.image is None:
        return None
    path = case.image
    image: Volume | None = _collect(findings, "image", case.id, lambda: _read(path, read_image))
    if image is not None:
        findings += _orientation(case, path)
    return image


def _orientation(case: Case, path: Path) -> Iterator[Finding]:
    doubt = orientation_doubt(path)
    if doubt is not None:
        yield _warning("orientation", case.id, text=doubt, fix="look at it in a viewer, and write the right affine to qform and sform")


def _label(case: Case, findings: list[Finding]) -> Mask | None:
    path = case.label
    assert path is not None
    mask: Mask | None = _collect(findings, "label", case.id, lambda: _read(path, read_mask))
    if mask is None:
        return None
    findings += _orientation(case, path)
    kind = stored_type(path)
    if kind.startswith("float"):
        text = f"{path} stores its labels as {kind}, which programs interpolate and round"
        findings.append(_warning("label-type", case.id, text=text, fix="save labels as uint8"))
    findings += _known(case, path, mask.ids())
    return mask


def _known(case: Case, path: Path, ids: Sequence[int]) -> Iterator[Finding]:
    strange = unknown_labels(ids, path)
    if strange:
        yield _error("labels-known", case.id, text=strange_labels(strange, path), fix=KNOWN_LABELS)
    if not any(ids):
        yield _error("labels-known", case.id, text=f"{path} holds no label at all", fix="label the case, or take it out of the list")


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="copy the file again") from error


def _modality(case: Case, image: Volume) -> Iterator[Finding]:
    if case.modality is None:
        return
    try:
        kind = find_modality(case.modality)
    except UsageError as error:
        yield _finding("modality", case.id, error)
        return
    low, high = float(image.array.min()), float(image.array.max())
    fix = "correct the modality in the list: it decides how values are scaled"
    if not kind.id:
        yield _error("modality", case.id, text="its modality is unknown", fix="name it in the list: ct, mri-t1, ...")
    elif kind.kind == "ct" and low > AIR_BELOW:
        text = f"it is listed as {kind.name}, and its values of {low:.6g} to {high:.6g} hold no air (about -1000 HU)"
        yield _error("modality", case.id, text=text, fix=f"{fix}; of a CT, set slope and intercept so that air is -1000")
    elif kind.kind == "ct" and high > HIGHEST_HU:
        text = f"it is listed as {kind.name}, and its values reach {high:.6g}, which is no HU"
        yield _warning("modality", case.id, text=text, fix="set slope and intercept in its header")
    elif kind.kind == "mr" and low < AIR_BELOW:
        text = f"it is listed as {kind.name}, and its values of {low:.6g} to {high:.6g} look like HU"
        yield _error("modality", case.id, text=text, fix=fix)


def unet_multiple(spec: ModelSpec) -> int:
    """Return what each axis of a volume must divide by, so that the diffusion model takes its latent whole."""
    levels = len(spec.networks["unet"].arguments.get("num_channels", ())) if "unet" in spec.networks else 1
    return FACTOR * 2 ** max(0, levels - 1)


def _size(case: Case, size: Size, spec: ModelSpec) -> Iterator[Finding]:
    """Look whether the volume, as `data encode` would put it on a grid without `--size`, fits the diffusion model."""
    multiple = unet_multiple(spec)
    if Encoding.chosen(spec, None, "mean", 0).size == "auto":
        return
    padded = [-(-n // FACTOR) * FACTOR for n in size]
    if any(n % multiple for n in padded):
        fitting = format_triple(-(-n // multiple) * multiple for n in size)
        yield _takes_parts_alone(case, size, spec, f"use  maisi data encode --size {fitting}, pad it to that, or train on crops alone")


def _takes_parts_alone(case: Case, size: Size, spec: ModelSpec, fix: str) -> Finding:
    text = f"{format_triple(size)} voxels make a latent that {spec.name} cannot take whole (multiples of {unet_multiple(spec)})"
    return _warning("size", case.id, text=text, fix=fix)


def _sides(case: Case, mask: Mask) -> Iterator[Finding]:
    wrong = "; ".join(each.text for each in laterality(None, mask, Context()) if not each.passed)
    if wrong:
        yield _error(
            "orientation", case.id, text=f"left and right of its label map look exchanged: {wrong}",
            fix="correct the affine of the file; or map its labels (maisi labels map) where they are those of another vocabulary",
        )  # fmt: skip


def _latent(case: Case, mask: Mask | None, spec: ModelSpec, findings: list[Finding]) -> int | None:
    """Look at a latent and its labels; return its channels."""

    def found(text: str) -> None:
        findings.append(_error("latent", case.id, text=text, fix="encode the list again:  maisi data encode"))

    assert case.latent is not None
    latent = _array(case.latent, found)
    labels = mask.array if mask is not None else None
    if case.label is not None and case.label.suffix == ".npy":
        labels = _array(case.label, found)
        if labels is not None and labels.dtype == np.uint8:
            findings += _known(case, case.label, np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist())
    if latent is None:
        return None
    if latent.ndim != 4 or latent.dtype != np.float16:
        found(f"{case.latent} holds {latent.dtype} of shape {format_triple(latent.shape)}, not float16 (C, x, y, z)")
        return None
    if not np.isfinite(latent).all():
        found(f"{case.latent} holds values that are not finite")
    x, y, z = (FACTOR * n for n in latent.shape[1:])
    if labels is not None and labels.shape != (x, y, z):
        found(f"its labels are {format_triple(labels.shape)}, not {FACTOR} times the latent: {format_triple((x, y, z))}")
    elif labels is not None and labels.dtype != np.uint8:
        found(f"its labels are {labels.dtype}, not uint8")
    if case.dim is not None and case.dim != (x, y, z):
        found(f"the list says {format_triple(case.dim)} voxels, and the latent is of {format_triple((x, y, z))}")
    if any(n % unet_multiple(spec) for n in (x, y, z)):
        findings.append(_takes_parts_alone(case, (x, y, z), spec, "encode it again with --size, or train on crops alone"))
    return int(latent.shape[0])


def _array(path: Path, found: Callable[[str], None]) -> Any:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        found(f"{path} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return None


def patient_of(case: Case) -> str:
    """Return whose image a case is: the list's `patient`, a BIDS `sub-` part of the id, or the id up to its longest number.

    `case_0001_t2` and `case_0001_t1` are one patient's. An id without a number stands for itself.
    """
    if "patient" in case.extra:
        return str(case.extra["patient"])
    bids = re.search(r"sub-[A-Za-z0-9]+", case.id)
    if bids:
        return bids.group()
    runs = list(_DIGITS.finditer(case.id))
    longest = max(runs, key=lambda run: (run.end() - run.start(), run.start()), default=None)
    return case.id[: longest.end()] if longest else case.id


# --- all cases together -------------------------------------------------------------------------


def _same_ids(seen: Sequence[Seen]) -> Iterator[Finding]:
    for group in _groups(seen, lambda one: one.id.casefold()):
        for one in group[1:]:
            yield _error("list", one.id, text=f"{one.where}: the id is there already ({group[0].where})",
                          fix="give each case an id of its own: its files are named after it")  # fmt: skip


def _copies(seen: Sequence[Seen], held_out: int) -> Iterator[Finding]:
    """Find equal images: within one part of the list they are duplicates, between two a leak."""
    for group in _groups(seen, lambda one: one.content):
        for one in group[1:]:
            other = next((each for each in group if _part(each, held_out) != _part(one, held_out)), None)
            if other is not None:
                yield _error("leakage", one.id, text=f"the same image as {other.id}, which is {_part(other, held_out)}; "
                              f"this one is {_part(one, held_out)}", fix="keep one of the two, or put both on one side")  # fmt: skip
            else:
                yield _warning("duplicate", one.id, text=f"the same image as {group[0].id}",
                              fix="keep one of the two: the other counts double")  # fmt: skip


def _patients(seen: Sequence[Seen], held_out: int) -> Iterator[Finding]:
    """Find patients on both sides whose images are not the same files (those are found already)."""
    for group in _groups(seen, lambda one: one.patient or None):
        parts: dict[str, Seen] = {}
        for one in group:
            parts.setdefault(_part(one, held_out), one)
        if len(parts) > 1 and len({one.content for one in parts.values()}) == len(parts):
            names = ", ".join(f"{one.id} is {part}" for part, one in parts.items())
            last = [*parts.values()][-1]
            yield _warning("leakage", last.id, text=f"{group[0].patient} looks like one patient on both sides: {names}",
                          fix='give all cases of a patient one fold; where they are not one, say so with a key "patient"')  # fmt: skip


def _part(one: Seen, held_out: int) -> str:
    return "testing" if one.section == "testing" else "held out" if one.fold == held_out else "trained on"


def _groups(seen: Iterable[Seen], key: Callable[[Seen], str | None]) -> Iterator[list[Seen]]:
    """Yield what shares a key with another."""
    found: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        name = key(one)
        if name is not None:
            found[name].append(one)
    yield from (group for group in found.values() if len(group) > 1)


def _vaes(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Find latents of another VAE, or with other channels, than most."""
    for what, key in (("VAE", lambda one: one.vae_sha256), ("number of channels", lambda one: one.channels)):
        values = [key(one) for one in seen if one.channels is not None]
        if len(set(values)) < 2:
            continue
        usual = max(dict.fromkeys(values), key=values.count)
        for one in seen:
            if one.channels is not None and key(one) != usual:
                yield _error("latent", one.id, text=f"its latent has another {what} than the others: {_short(key(one))}, "
                              f"not {_short(usual)}", fix="encode all cases with one VAE:  maisi data encode")  # fmt: skip


def _short(value: Any) -> str:
    return "one that is not named" if value is None else str(value)[:12]


def _folds(seen: Sequence[Seen], held_out: int) -> Iterator[Finding]:
    """Find lists of which nothing is trained on, or nothing held out."""
    folds = [one.fold for one in seen if one.section == "training" and one.fold is not None]
    if not seen:
        yield _error("fold", None, text="the list names no case", fix="add cases, or make some:  maisi data phantom")
    elif folds and held_out not in folds:
        yield _error("fold", None, text=f"no case is held out (fold {held_out})",
                      fix=f'give some cases  "fold": {held_out}, about one in ten')  # fmt: skip
    elif folds and set(folds) == {held_out}:
        yield _error("fold", None, text=f"every case is held out (fold {held_out})", fix="give some cases another fold")
