"""Latents made ahead of training: images through a VAE, labels on the same grid, and what ties the two to their sources.

Every case becomes `{id}_latent.npy`, float16 (C, x, y, z), `{id}_labels.npy`, uint8 (4x, 4y, 4z), and `{id}_latent.json`, which
holds the hashes of image, labels and VAE and the settings: a case whose hashes and settings are the same is not encoded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..anatomy import maisi
from ..catalog import ModelSpec
from ..catalog import modality as find_modality
from ..catalog import model as find_model
from ..errors import MaisiError, Rejected, UsageError
from ..events import Note, OnEvent, Saved, Stage, Step, ignore
from ..files import refuse_overwriting, write_atomic
from ..geometry import Geometry, Size, Triple, format_triple, parse_size
from ..labelfile import read_labels
from ..masks.fitting import fit, same_spacing
from ..record import sha256_of
from ..settings import PRECISIONS
from ..volumes import Mask, onto, read_image, read_mask, require_same_grid
from .lists import HELD_OUT, SECTIONS, Case, read_lists, write_list

if TYPE_CHECKING:
    from ..networks import Networks

LATENTS = "latents.json"
SCHEMA = "maisi.latents/1"
FACTOR = 4
"""Voxels of the image to a latent voxel, along an axis."""
ROUND_TO = 128
SAME_MM = 1e-2
"""How far, relative to the header's, a spacing of the list may lie from it."""
LATENT_KINDS = ("mean", "sample")


# --- intensities and grids ----------------------------------------------------------------------


def intensity(values: NDArray[Any], kind: str = "ct") -> NDArray[np.float32]:
    """Scale an image for the VAE: CT from [-1000, 1000] HU, clipped, to [0, 1]; MR from its 0th..99.5th percentile, without clipping.

    Raises `UsageError` for an MR image of one value.
    """
    if kind == "ct":
        return (np.clip(values, -1000, 1000).astype(np.float32) + 1000) / 2000
    low, high = (float(each) for each in np.percentile(values, (0, 99.5)))
    if high <= low:
        raise UsageError(f"99.5 % of the image's values are {low:g}: it shows nothing", hint="take the case out of the list")
    return ((np.asarray(values, dtype=np.float32) - low) / (high - low)).astype(np.float32)


def rounded(size: Size) -> Size:
    """Return the multiples of 128 that the reference encodes at, at least 128 an axis; a half goes to the even multiple."""
    x, y, z = (max(round(n / ROUND_TO), 1) * ROUND_TO for n in size)
    return x, y, z


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How cases are encoded.

    `size` is `auto` (resampled to the reference's multiples of 128), `original` (padded at the end to a multiple of 4) or voxels.
    `latent` is the posterior's `mean`, or a `sample` of it that depends on `seed` and the case's id alone.
    """

    size: str | Size = "original"
    latent: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.latent not in LATENT_KINDS:
            raise UsageError(f"--latent {self.latent!r} is not known", hint=f"use --latent {' or '.join(LATENT_KINDS)}")
        if not isinstance(self.size, str) and any(n % FACTOR for n in self.size):
            raise UsageError(f"size {format_triple(self.size)} does not divide by {FACTOR}",
                             hint=f"use {format_triple(-(-n // FACTOR) * FACTOR for n in self.size)}")  # fmt: skip

    @classmethod
    def chosen(cls, spec: ModelSpec, size: str | Size | None, latent: str, seed: int) -> Encoding:
        """Return the settings as typed; without a size that which suits the model.

        It is `auto` for a model of sizes that divide by 128, as the released ones are, and `original` for one of other sizes.
        """
        if size is None:
            size = "auto" if spec.limits.multiple % ROUND_TO == 0 else "original"
        return cls(size=size if size in ("auto", "original") else parse_size(size), latent=latent, seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """Return what of the settings decides about the numbers, as JSON shows it."""
        size = self.size if isinstance(self.size, str) else format_triple(self.size)
        return {"size": size, "latent": self.latent, **({"seed": self.seed} if self.latent == "sample" else {})}

    def grid(self, geometry: Geometry) -> Geometry:
        """Return the grid on which an image is encoded: the same field of view, or with `original` voxels added at the end."""
        if self.size == "original":
            x, y, z = (-(-n // FACTOR) * FACTOR for n in geometry.size)
            return dataclasses.replace(geometry, size=(x, y, z), affine_rows=geometry.affine)
        size = rounded(geometry.size) if isinstance(self.size, str) else self.size
        x_mm, y_mm, z_mm = (old * mm / new for old, mm, new in zip(geometry.size, geometry.spacing, size, strict=True))
        return geometry.regridded(size, (x_mm, y_mm, z_mm))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case as the VAE sees it: `image` (X, Y, Z) float32, about 0..1, `labels` (X, Y, Z) uint8 or None, in RAS on `geometry`."""

    image: NDArray[np.float32]
    labels: NDArray[np.uint8] | None
    geometry: Geometry


def prepared(case: Case, encoding: Encoding) -> Prepared:
    """Read a case and put it on the grid that it is encoded on: intensities first, then trilinear for the image, nearest for labels.

    Raises `UsageError` for what cannot be trusted: no image, grids that differ, a spacing that is not the header's, unknown labels.
    """
    if case.image is None:
        raise UsageError("it has no image", hint="a list to encode names one for each case")
    kind = find_modality(case.modality)
    if not kind.id:
        raise UsageError(
            f"its modality is {kind.name!r}", hint="name it in the list, such as ct or mri-t1: it decides how values are scaled"
        )
    image = read_image(case.image, modality=kind.name)
    require_spacing(case.spacing_mm, image.geometry)
    mask = None
    if case.label is not None:
        mask = read_mask(case.label)
        require_same_grid(image, mask)
        require_known(mask, case.label)
    image = dataclasses.replace(image, array=intensity(image.array, kind.kind))
    grid = encoding.grid(image.geometry)
    if encoding.size == "original":
        widths = [(0, new - old) for new, old in zip(grid.size, image.geometry.size, strict=True)]
        return Prepared(image=np.pad(image.array, widths), labels=np.pad(mask.array, widths) if mask else None, geometry=grid)
    array = onto(image, grid).array
    return Prepared(
        image=array, labels=fit(dataclasses.replace(mask, geometry=image.geometry), grid).array if mask else None, geometry=grid
    )


def require_spacing(listed: Triple, geometry: Geometry) -> None:
    """Refuse a list's spacing that is not the image's, in RAS order, to within 1 %. Raises `UsageError`."""
    if not same_spacing(listed, geometry.spacing, SAME_MM):
        order = " (in another order of axes)" if same_spacing(sorted_triple(listed), sorted_triple(geometry.spacing), SAME_MM) else ""
        raise UsageError(f"the list says {_mm(listed)} mm, and the image's header {_mm(geometry.spacing)} mm{order}",
                         hint="correct the list, in the order right, anterior, superior, or leave spacing out")  # fmt: skip


def sorted_triple(values: Triple) -> Triple:
    """Return three numbers in order of size."""
    x, y, z = sorted(values)
    return x, y, z


def _mm(values: Triple) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def unknown_labels(ids: Iterable[int], path: Path) -> tuple[int, ...]:
    """Return those of a label map's ids that neither the vocabulary nor the `labels.json` beside the file has."""
    beside = read_labels(path.parent) or {"labels": []}
    known = {0, *maisi().ids(), *(row["id"] for row in beside["labels"])}
    return tuple(label for label in ids if label not in known)


def require_known(mask: Mask, path: Path) -> None:
    """Refuse a label map with ids that nothing names. Raises `UsageError`."""
    strange = unknown_labels(mask.ids(), path)
    if strange:
        raise UsageError(strange_labels(strange, path), hint=KNOWN_LABELS)


KNOWN_LABELS = "map them with  maisi labels map, or name them in a labels.json beside the label map"


def strange_labels(ids: Sequence[int], path: Path) -> str:
    """Return the sentence about ids that nothing names."""
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"{path} holds {'ids' if len(ids) > 1 else 'the id'} {shown} that the vocabulary does not have"


# --- encoding -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an encoding made: its list, and the ids that were encoded, kept from before, and failed, with the error of each."""

    list: Path
    encoded: tuple[str, ...]
    kept: tuple[str, ...]
    failed: Mapping[str, MaisiError] = field(default_factory=dict)

    def require_all(self) -> None:
        """Raise `Rejected`, naming the cases, when some failed."""
        if self.failed:
            names = ", ".join([*self.failed][:6]) + (", ..." if len(self.failed) > 6 else "")
            total = len(self.failed) + len(self.encoded) + len(self.kept)
            raise Rejected(f"{len(self.failed)} of {total} cases were not encoded: {names}",
                           hint="see  maisi data check; correct them and encode again: what is done is kept")  # fmt: skip


def encode(
    data: str | Path, vae: str | Path | None = None, *, out: str | Path | None = None, model: str = "nano-ct", device: str = "auto",
    dtype: str = "auto", size: str | Size | None = None, latent: str = "mean", seed: int = 0, force: bool = False,
    on_event: OnEvent = ignore,
) -> Path:  # fmt: skip
    """Encode the images of a list with a VAE, by default to the posterior's mean; return the list of the latents.

    `vae` is a safetensors file of weights; without it the model's own are used. `dtype` is `fp32`, `bf16` or `fp16`; `auto` is
    fp16 on CUDA and fp32 elsewhere. `size`, `latent` and `seed` are those of `Encoding`. Raises `Rejected` when a case could not
    be encoded, after all others were.
    """
    folder = Path(out) if out else (Path(data) if Path(data).is_dir() else Path(data).parent)
    done = encode_lists(
        [data], vae, out=folder, model=model, device=device, dtype=dtype, size=size, latent=latent, seed=seed, force=force,
        on_event=on_event,
    )  # fmt: skip
    done.require_all()
    return done.list


def encode_lists(
    lists: Sequence[str | Path], vae: str | Path | None = None, *, out: str | Path, bases: Sequence[str | Path] = (),
    model: str = "nano-ct", device: str = "auto", dtype: str = "auto", size: str | Size | None = None, latent: str = "mean",
    seed: int = 0, force: bool = False, on_event: OnEvent = ignore,
) -> Outcome:  # fmt: skip
    """Encode the cases of one list or several, training and testing, into a folder; write their `latents.json`.

    A case that the same VAE encoded from the same files with the same settings is kept, unless `force`. Cases that cannot be
    encoded are said as warnings, and left out of the list. Raises `UsageError` for latents there of another VAE, other settings
    or, where `dtype` is not `auto`, another precision.
    """
    from ..weights import locate

    spec = find_model(model)
    encoding = Encoding.chosen(spec, size, latent, seed)
    if dtype not in ("auto", *PRECISIONS):
        raise UsageError(f"there is no precision {dtype!r}", hint="use --dtype auto, fp32, bf16 or fp16")
    file = Path(vae) if vae is not None else locate(spec, ["vae"])["vae"]
    cases = read_lists(lists, bases=bases, sections=SECTIONS)
    work = _Work(folder=Path(out), encoding=encoding, vae=file, vae_sha256=sha256_of(file), dtype=dtype, force=force)
    work.refuse_others(cases)
    on_event(Stage(name="encode", detail=f"{len(cases)} cases"))
    rows: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    encoded, kept = [], []
    failed: dict[str, MaisiError] = {}
    networks: Networks | None = None
    for done, (case, result) in enumerate(_ahead(work.read, cases), 1):
        side, read = None, None
        with _collected(case, failed, on_event):
            read = result()
            side = read.side
            kept += [case.id] * (side is not None)
        if read is not None and side is None:
            networks = networks or _load(spec, file, device, dtype)
            with _collected(case, failed, on_event):
                side = work.encode(case, read, networks)
                encoded.append(case.id)
        if side is not None:
            rows[case.section].append(_row(case, side))
        on_event(Step(stage="encode", done=done, total=len(cases)))
    target = work.folder / LATENTS
    if encoded or kept:
        write_list(target, rows["training"], **({"testing": rows["testing"]} if rows["testing"] else {}), schema=SCHEMA)
        on_event(Saved(path=target, kind="list"))
        _say_folds(rows["training"], on_event)
    return Outcome(list=target, encoded=tuple(encoded), kept=tuple(kept), failed=failed)


T = TypeVar("T")


def _ahead(work: Callable[[Case], T], cases: Sequence[Case]) -> Iterator[tuple[Case, Callable[[], T]]]:
    """Yield each case with a call that returns what `work` made of it, or raises; the next one is worked on meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(work, case) for case in cases[:1])
        for number, case in enumerate(cases, 1):
            waiting.extend(pool.submit(work, each) for each in cases[number : number + 1])
            yield case, waiting.popleft().result


@contextlib.contextmanager
def _collected(case: Case, failed: dict[str, MaisiError], on_event: OnEvent) -> Iterator[None]:
    """Keep what is wrong with one case, so that the others are still encoded; a full disk or a missing device ends all."""
    try:
        yield
    except UsageError as error:
        failed[case.id] = error
    except OSError as error:
        failed[case.id] = UsageError(f"{error.filename} cannot be read: {error.strerror}", hint="copy the file again")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # the latter is torch's
            raise
        failed[case.id] = UsageError("out of memory", hint="use a smaller --size, or --device cpu")
    if case.id in failed:
        on_event(Note(text=f"case {case.id} was not encoded: {failed[case.id]}", level="warning"))


def _say_folds(rows: Sequence[Mapping[str, Any]], on_event: OnEvent) -> None:
    if len({row["fold"] == HELD_OUT for row in rows}) < 2:
        on_event(Note(text=f"the list holds out no case (fold {HELD_OUT}) or trains on none", level="warning"))


def _load(spec: ModelSpec, file: Path, device: str, dtype: str) -> Networks:
    from ..networks import Precision, device_named, load

    where = device_named(device)
    precision = Precision.named("fp32" if dtype == "auto" and where.type == "cpu" else dtype, where)
    return load(dataclasses.replace(spec, scale_factor=1.0), ["vae"], device=where, precision=precision, files={"vae": file})


def _sources(case: Case) -> dict[str, Any]:
    """Return what of a case decides about its latent: the hashes of its files, and how its intensities are scaled."""
    return {
        "image_sha256": sha256_of(case.image) if case.image else None, "label_sha256": sha256_of(case.label) if case.label else None,
        "intensity": find_modality(case.modality).kind,
    }  # fmt: skip


def regions_of(case: Case) -> dict[str, Any]:
    """Return the body regions of a case as a list has them."""
    return dict(zip(("top_region_index", "bottom_region_index"), case.regions, strict=True)) if case.regions else {}


def _row(case: Case, side: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of an encoded case."""
    files = {"latent": f"{case.id}_latent.npy", **({"label": f"{case.id}_labels.npy"} if case.label else {})}
    made = {key: side[key] for key in ("dim", "spacing", "vae_sha256", "image_sha256")}
    return {**case.extra, "id": case.id, **files, **made, "modality": case.modality, "fold": case.fold, **regions_of(case)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A case that was read: what its latent depends on, and what is known of a latent that is there, or else the case for the VAE."""

    sources: Mapping[str, Any]
    side: Mapping[str, Any] | None
    ready: Prepared | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """An encoding into a folder."""

    folder: Path
    encoding: Encoding
    vae: Path
    vae_sha256: str
    dtype: str
    force: bool

    def path(self, case: Case, what: str) -> Path:
        return self.folder / f"{case.id}_{what}"

    def refuse_others(self, cases: Sequence[Case]) -> None:
        """Refuse, before anything is made, to replace what this encoding did not make, or would leave out. Raises `UsageError`."""
        if self.force:
            return
        target = self.folder / LATENTS
        if target.exists():
            there = _json(target)
            if there.get("schema") != SCHEMA:
                refuse_overwriting(target, force=False)
            lost = {row.get("id") for section in SECTIONS for row in there.get(section, [])} - {case.id for case in cases}
            if lost:
                raise UsageError(f"{target} already exists, and lists {len(lost)} cases more, such as {min(map(str, lost))}",
                                 hint="add --force to replace it, or choose another --out")  # fmt: skip
        for case in cases:
            side = self.path(case, "latent.json")
            if not side.exists():
                for what in ("latent.npy", "labels.npy"):
                    refuse_overwriting(self.path(case, what), force=False)
                continue
            found = _json(side)
            if found.get("vae_sha256") != self.vae_sha256:
                raise UsageError(f"{self.path(case, 'latent.npy')} already exists, encoded by another VAE than {self.vae}",
                                 hint="add --force to replace it, or choose another --out")  # fmt: skip
            if found.get("encoding") != self.encoding.as_dict():
                raise UsageError(f"{self.path(case, 'latent.npy')} already exists, encoded with {_words(found.get('encoding'))}",
                                 hint="add --force to replace it, or choose another --out")  # fmt: skip
            if self.dtype not in ("auto", found.get("precision")):
                raise UsageError(f"{self.path(case, 'latent.npy')} already exists, encoded in {found.get('precision')}, not {self.dtype}",
                                 hint="add --force to replace it, or leave out --dtype")  # fmt: skip

    def sidecar(self, case: Case, sources: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is known of a latent that is there already; None where there is none, or another, or a damaged one."""
        found = _json(self.path(case, "latent.json"))
        wanted = {**sources, "vae_sha256": self.vae_sha256, "encoding": self.encoding.as_dict()}
        if any(found.get(key, "") != value for key, value in wanted.items()):
            return None
        try:
            size = tuple(found["dim"])
            latent = np.load(self.path(case, "latent.npy"), mmap_mode="r")
            labels = np.load(self.path(case, "labels.npy"), mmap_mode="r") if case.label else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        whole = tuple(FACTOR * n for n in latent.shape[1:]) == size and (labels is None or labels.shape == size)
        return found if whole else None

    def read(self, case: Case) -> _Read:
        """Read a case where its latent is not there already."""
        sources = _sources(case)
        side = None if self.force else self.sidecar(case, sources)
        return _Read(sources=sources, side=side, ready=prepared(case, self.encoding) if side is None else None)

    def encode(self, case: Case, read: _Read, networks: Networks) -> dict[str, Any]:
        """Encode a case, write its files, the sidecar last, and return the sidecar."""
        import torch

        ready = read.ready
        assert ready is not None
        image = torch.from_numpy(np.ascontiguousarray(ready.image))[None, None]
        if self.encoding.latent == "mean":
            made = networks.encode(image)[0].cpu().numpy()
        else:
            mean, deviation = (part[0].cpu().numpy() for part in networks.posterior(image))
            made = mean + deviation * _noise(self.encoding.seed, case.id, mean.shape)
        latent = made.astype(np.float16)
        if not np.isfinite(latent).all():
            raise UsageError("its latent holds values that are not finite in float16", hint="check the VAE's weights; try --device cpu")
        geometry = ready.geometry
        side = {
            "schema": SCHEMA, "id": case.id, "dim": list(geometry.size), "spacing": list(geometry.spacing), "affine": geometry.affine,
            "modality": case.modality, **read.sources, "vae_sha256": self.vae_sha256, "encoding": self.encoding.as_dict(),
            "precision": networks.precision.name, "source": str(case.image),
        }  # fmt: skip
        self.path(case, "latent.json").unlink(missing_ok=True)  # it must not speak for files that are only half replaced
        write_atomic(self.path(case, "latent.npy"), npy(latent))
        if ready.labels is not None:
            write_atomic(self.path(case, "labels.npy"), npy(ready.labels))
        write_atomic(self.path(case, "latent.json"), (json.dumps(side, indent=1) + "\n").encode())
        return side


def _noise(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard normal noise that depends on the seed and the case's id alone."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, digest]).standard_normal(shape, dtype=np.float32)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _words(encoding: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in encoding.items()) if isinstance(encoding, dict) else "other settings"


def npy(array: NDArray[Any]) -> bytes:
    """Return an array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
