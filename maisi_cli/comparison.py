"""Comparing two sets of volumes: `maisi fid` as a function.

The features of each volume are computed once and written to disk, by one process or several; everything after reads them
volume by volume, in the order of the files, so that neither the number of processes nor that of volumes changes a number or
the memory. FID, kernel distance and the interval are per plane (`xy`, `yz`, `zx`) and for the average of the planes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import distances
from .catalog import modality as find_modality
from .distances import Moments
from .errors import CannotRun, UsageError, unknown
from .events import Note, OnEvent, Saved, Stage, Step, ignore
from .features import OURS, Extractor, check_channels, features_of, open_extractor
from .files import refuse_overwriting, write_atomic
from .geometry import format_triple
from .networks import device_named
from .record import sha256_of
from .slices import PLANES, Profile
from .slices import profile as find_profile
from .team import Team, team
from .volumes import SUFFIXES, Mask, Volume, read_image, read_mask, require_same_grid

METRICS = ("fid", "kid", "prdc", "organs")
CACHE_SCHEMA, STATISTICS_SCHEMA, SCHEMA = "maisi.fid-cache/1", "maisi.fid-statistics/1", "maisi.fid/1"
BODY = 200
FEW_VOLUMES, FEW_SLICES = 50, 2048
_SPLITS, _KID_ROWS, _BUDGET, _MANY_FEATURES = 10, 2000, 2**29, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A volume of a set: its image, and the label map beside it when there is one."""

    name: str
    image: Path
    label: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneStatistics:
    """The slices of one plane: moments of all, and per volume their number (V,) and mean features (V, D)."""

    moments: Moments
    counts: NDArray[np.int64]
    means: NDArray[np.float64]

    @property
    def effective(self) -> float:
        """For how many independent slices these count."""
        kept = self.counts > 0
        return distances.effective_number([float(n) for n in self.counts[kept]], self.means[kept], self.moments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What is kept of a set of volumes; `stored` are the files with the features of each, () where only this is left.

    `organs` maps, for each volume with a label map, organ ids to their volume in ml and median intensity; None without.
    `baseline` is the FID of random halves of the set against each other, one row a split: (splits, 3 planes).
    """

    source: str
    profile: Profile
    extractor: Mapping[str, Any]
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    spacing_mm: tuple[tuple[float, float, float], ...]
    planes: Mapping[str, PlaneStatistics]
    organs: tuple[Mapping[int, tuple[float, float]] | None, ...]
    baseline: NDArray[np.float64]
    stored: tuple[Path, ...] = ()

    @property
    def volumes(self) -> int:
        """The number of volumes."""
        return len(self.names)

    @property
    def dimensions(self) -> int:
        """The number of features of a slice."""
        return len(self.planes["xy"].moments.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that `maisi fid` says; `as_dict` is its JSON."""

    fid: Mapping[str, float]
    ci95: Mapping[str, Any] | None
    baseline: Mapping[str, Any] | None
    kid: Mapping[str, Any] | None
    prdc: Mapping[str, Any] | None
    organs: Mapping[str, Any] | None
    n_volumes: Mapping[str, int]
    n_slices: Mapping[str, Mapping[str, int]]
    effective_n: Mapping[str, float]
    features: Mapping[str, Any]
    profile: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
        return {"schema": SCHEMA, **{name: getattr(self, name) for name in self.__slots__ if name not in ("warnings", "notes")},
                "warnings": list(self.warnings), "notes": list(self.notes)}  # fmt: skip


# --- the volumes --------------------------------------------------------------------------------


def cases(source: Path) -> list[Case]:
    """Return the volumes of a folder, or of a list file with a path a line, in alphabetical order.

    In a folder they are the `*_image` files, or where there are none all NIfTI files but label maps. Paths of a list are
    seen from its own folder. Raises `UsageError` for what holds no volume.
    """
    if source.is_dir():
        found = sorted(each for end in SUFFIXES for each in source.rglob(f"*{end}") if each.is_file() and not each.name.startswith("."))
        named = [each for each in found if _stem(each).endswith("_image")]
        images = named or [each for each in found if not _stem(each).endswith(("_label", "_seg", "_mask"))]
        if not images:
            raise UsageError(f"{source} holds no image (*.nii.gz)", hint="give a folder with volumes, or a list of them")
    elif not source.is_file():
        raise UsageError(f"there is no file or folder {source}", hint="check the path")
    elif source.name.endswith(SUFFIXES):
        raise UsageError(f"{source} is one volume, and a distance is between sets", hint="give its folder, or a list of volumes")
    else:
        try:
            lines = [line.strip() for line in source.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{source} is neither a list of files nor saved statistics", hint="write one path a line") from error
        images = sorted(source.parent / line for line in lines if line and not line.startswith("#"))
        missing = next((each for each in images if not each.is_file()), None)
        if missing is not None or not images:
            raise UsageError(f"{source} names {missing}, which is not there" if missing else f"{source} names no volume",
                             hint="paths are seen from the folder of the list")  # fmt: skip
    return [Case(name=_stem(each).removesuffix("_image"), image=each, label=_label(each)) for each in images]


def _stem(path: Path) -> str:
    return path.name.split(".nii")[0]


def _label(image: Path) -> Path | None:
    stem = _stem(image).removesuffix("_image")
    return next((each for end in SUFFIXES if (each := image.with_name(f"{stem}_label{end}")).is_file()), None)


def chosen(found: Sequence[Case], number: int | None, order: str, seed: int) -> list[Case]:
    """Return `number` of the volumes, the first (`sorted`) or a random draw (`random`), in alphabetical order."""
    if number is None or number >= len(found):
        return list(found)
    if order == "sorted":
        return list(found[:number])
    rng = np.random.default_rng([0x6E756D, seed])
    return [found[k] for k in sorted(rng.choice(len(found), number, replace=False))]


# --- features on disk ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A folder with the features of volumes, of one extractor and one profile, found by the content of the files."""

    folder: Path
    extractor: Extractor
    profile: Profile

    def check(self) -> None:
        """Mark a new folder, and refuse one that holds features of another extractor or profile. Raises `UsageError`."""
        mark = self.folder / "cache.json"
        ours = {"schema": CACHE_SCHEMA, "profile": self.profile.as_dict(), "features": self.extractor.as_dict()}
        if not mark.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise UsageError(f"{self.folder} is not empty, and no cache of features", hint="give a new folder to --cache")
            write_atomic(mark, (json.dumps(ours, indent=2) + "\n").encode())
            return
        try:
            theirs = json.loads(mark.read_text("utf-8"))
            same_profile(self.profile, theirs["profile"], str(self.folder))
            same_extractor(self.extractor.as_dict(), theirs["features"], str(self.folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{mark} cannot be read", hint="give another folder to --cache") from error

    def path(self, key: str) -> Path:
        """Return where the features of a volume lie."""
        return self.folder / f"{key}.npz"


def same_profile(ours: Profile, theirs: Mapping[str, Any], where: str) -> None:
    """Refuse features of another preprocessing, naming both. Raises `UsageError`."""
    if theirs["sha256"] == ours.sha256:
        return
    mine = json.loads(json.dumps(ours.as_dict()))
    differing = ", ".join(f"{key} {theirs.get(key)} against {value}" for key, value in mine.items()
                          if key not in ("name", "sha256") and theirs.get(key) != value)  # fmt: skip
    raise UsageError(
        f"{where} was made with profile {_named(theirs)}, not {_named(mine)}: {differing}",
        hint="use the same profile, or another --cache",
    )


def same_extractor(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Refuse features of another extractor or other weights, naming both. Raises `UsageError`."""
    if theirs["sha256"] != ours["sha256"]:
        raise UsageError(
            f"{where} was made with features {_named(theirs)}, not {_named(ours)}", hint="use the same --features, or another --cache"
        )


def _named(about: Mapping[str, Any]) -> str:
    return f"{about['name']} ({about['sha256'][:12]})"


def _key(case: Case, labels: bool) -> str:
    """Return the name of a volume's features: a hash of its image and of its label map."""
    parts = [sha256_of(case.image), sha256_of(case.label) if labels and case.label else ""]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:40]


def _compute(case: Case, cache: Cache, *, modality: str, labels: bool, device: Any, batch: int | None) -> bytes:
    """Return the features of a volume, its spacing and its organs as the bytes of an .npz."""
    image = read_image(case.image, modality=modality)
    found: dict[str, NDArray[Any]] = dict(features_of(image, cache.extractor, cache.profile, device=device, batch=batch))
    found["spacing_mm"] = np.asarray(image.geometry.spacing)
    found["image_sha256"] = np.frombuffer(bytes.fromhex(sha256_of(case.image)), np.uint8)
    if labels and case.label is not None:
        mask = read_mask(case.label)
        require_same_grid(image, mask)
        found["organs"] = organs_of(image, mask)
    buffer = io.BytesIO()
    np.savez(buffer, **found)  # type: ignore[arg-type]
    return buffer.getvalue()


def organs_of(image: Volume, mask: Mask) -> NDArray[np.float64]:
    """Return a row for each organ of a mask: its id, its volume in ml, its median intensity."""
    voxel_ml = float(np.prod(image.geometry.spacing)) / 1000
    flat, values = mask.array.ravel(), image.array.ravel()
    order = np.argsort(flat, kind="stable")
    counts = mask.counts()
    ends = np.cumsum(counts)
    rows = [(float(label), float(counts[label]) * voxel_ml, float(np.median(values[order[ends[label] - counts[label] : ends[label]]])))
            for label in np.flatnonzero(counts) if label not in (0, BODY)]  # fmt: skip
    return np.asarray(rows, dtype=np.float64).reshape(-1, 3)


def _load(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz, or those named. Raises `UsageError` for a damaged file."""
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path} is damaged", hint="remove it; its features are computed again") from error


# --- statistics ---------------------------------------------------------------------------------


def _collect(
    source: Path, found: Sequence[Case], cache: Cache, crew: Team, *, side: str, modality: str, labels: bool, device: Any,
    batch: int | None, on_event: OnEvent,
) -> Statistics | None:  # fmt: skip
    """Compute what is missing of a set's features, this process its share, and gather the statistics on the first process."""
    on_event(Stage(name=f"features of {side}", detail=f"{len(found)} volumes"))
    keys: dict[int, str] = {}
    mine = range(crew.rank, len(found), crew.size)
    for done, k in enumerate(mine, 1):
        keys[k] = _key(found[k], labels)
        if not cache.path(keys[k]).is_file():
            write_atomic(cache.path(keys[k]), _compute(found[k], cache, modality=modality, labels=labels, device=device, batch=batch))
        on_event(Step(stage=f"features of {side}", done=done, total=len(mine)))
    for part in crew.gather(keys):
        keys |= part
    if crew.rank:
        return None
    paths = tuple(cache.path(keys[k]) for k in range(len(found)))
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise CannotRun(f"{missing} is missing: the processes do not share a disk", hint="give --cache a folder that all machines see")
    return _statistics(str(source), cache, [case.name for case in found], paths)


def _statistics(source: str, cache: Cache, names: Sequence[str], paths: tuple[Path, ...]) -> Statistics:
    merged: dict[str, Moments] = {}
    counts: dict[str, list[int]] = {plane: [] for plane in PLANES}
    means: dict[str, list[NDArray[np.float64]]] = {plane: [] for plane in PLANES}
    organs: list[dict[int, tuple[float, float]] | None] = []
    spacings, hashes = [], []
    for path in paths:
        found = _load(path)
        for plane in PLANES:
            part = Moments.of(found[plane])
            merged[plane] = merged[plane].merged(part) if plane in merged else part
            counts[plane].append(int(part.n))
            means[plane].append(part.mean)
        rows = found.get("organs")
        organs.append(None if rows is None else {int(label): (float(ml), float(value)) for label, ml, value in rows})
        spacings.append((float(found["spacing_mm"][0]), float(found["spacing_mm"][1]), float(found["spacing_mm"][2])))
        hashes.append(found["image_sha256"].tobytes().hex())
    planes = {
        plane: PlaneStatistics(moments=merged[plane], counts=np.asarray(counts[plane]), means=np.stack(means[plane])) for plane in PLANES
    }
    thin = next((plane for plane in PLANES if planes[plane].moments.n < 2), None)
    if thin is not None:
        raise UsageError(f"{source} has {planes[thin].moments.n:g} slices of plane {thin}, too few for a covariance",
                         hint="add volumes, or use more of each with --center-slices 1")  # fmt: skip
    return Statistics(source=source, profile=cache.profile, extractor=cache.extractor.as_dict(), names=tuple(names), sha256=tuple(hashes),
                      spacing_mm=tuple(spacings), planes=planes, organs=tuple(organs), baseline=np.zeros((0, 3)), stored=paths)  # fmt: skip


def _parts(stored: Sequence[Path], plane: str) -> Iterator[Moments]:
    for path in stored:
        yield Moments.of(_load(path, plane)[plane])


def _resampled(found: Statistics, weights: NDArray[np.float64], plane: str) -> Iterator[Moments]:
    """Yield the moments of a set with its volumes weighted, a row of weights after the other, within a bound of memory."""
    at_once = max(1, _BUDGET // (8 * found.dimensions**2))
    for start in range(0, len(weights), at_once):
        yield from distances.weighted(_parts(found.stored, plane), weights[start : start + at_once])


def _halves(found: Statistics, splits: int, seed: int) -> NDArray[np.float64]:
    """Return the FID of random halves of a set, (splits, 3 planes); no row with fewer than four volumes."""
    if found.volumes < 4 or splits < 1:
        return np.zeros((0, len(PLANES)))
    one, other = distances.split_weights(found.volumes, splits, seed)
    columns = []
    for plane in PLANES:
        halves = zip(_resampled(found, one, plane), _resampled(found, other, plane), strict=True)
        columns.append([_fid(a, b) for a, b in halves])
    return np.asarray(columns, dtype=np.float64).T


def _fid(one: Moments, other: Moments) -> float:
    return distances.frechet(one, other) if min(one.n, other.n) >= 2 else float("nan")


def save(found: Statistics, path: Path, *, force: bool = False) -> Path:
    """Write the statistics of a set as .npz, to be compared with later or elsewhere: no image can be got back from them."""
    if path.suffix != ".npz":
        raise UsageError(f"{path} is not named .npz", hint="name saved statistics *.npz")
    refuse_overwriting(path, force=force)
    about = {"schema": STATISTICS_SCHEMA, "source": Path(found.source).name, "profile": found.profile.as_dict(),
             "features": dict(found.extractor), "names": list(found.names), "sha256": list(found.sha256),
             "spacing_mm": [list(each) for each in found.spacing_mm],
             "organs": [None if each is None else {str(key): value for key, value in each.items()} for each in found.organs]}  # fmt: skip
    arrays: dict[str, NDArray[Any]] = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), "baseline": found.baseline}
    for plane, each in found.planes.items():
        arrays |= {f"{plane}_mean": each.moments.mean, f"{plane}_scatter": each.moments.scatter, f"{plane}_counts": each.counts,
                   f"{plane}_means": each.means}  # fmt: skip
    write_atomic(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return path


def load_statistics(path: Path) -> Statistics:
    """Read statistics that `save` wrote. Raises `UsageError` for anything else."""
    try:
        arrays = _load(path)
        about = json.loads(arrays["about"].tobytes())
        if about["schema"] != STATISTICS_SCHEMA or not {"name", "sha256"} <= set(about["features"]):
            raise ValueError("another schema")
        fields = {key: _tuple(value) for key, value in about["profile"].items() if key != "sha256"}
        planes = {plane: PlaneStatistics(
            moments=Moments(n=float(arrays[f"{plane}_counts"].sum()), mean=arrays[f"{plane}_mean"], scatter=arrays[f"{plane}_scatter"]),
            counts=arrays[f"{plane}_counts"], means=arrays[f"{plane}_means"]) for plane in PLANES}  # fmt: skip
        return Statistics(
            source=str(path), profile=Profile(**fields), extractor=about["features"], names=tuple(about["names"]),
            sha256=tuple(about["sha256"]), spacing_mm=_tuple(about["spacing_mm"]), planes=planes, baseline=arrays["baseline"],
            organs=tuple(None if each is None else {int(key): (value[0], value[1]) for key, value in each.items()}
                         for each in about["organs"]),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds no statistics of maisi", hint="give what  maisi fid --save  wrote, a folder, or a list") from error


def _tuple(value: Any) -> Any:
    return tuple(_tuple(each) for each in value) if isinstance(value, list) else value


# --- the whole ----------------------------------------------------------------------------------


def compare(
    real: str | Path, synth: str | Path | None = None, *, features: str | Extractor | None = None, profile: str | Profile | None = None,
    changes: Mapping[str, Any] | None = None, modality: str = "ct", metrics: Sequence[str] = METRICS, baseline: str = "split",
    bootstrap: int | None = None, num_images: int | None = None, seed: int = 0, cache: str | Path | None = None, device: str = "auto",
    batch: int | None = None, save_to: str | Path | None = None, force: bool = False, on_event: OnEvent = ignore,
) -> Comparison | None:  # fmt: skip
    """Compare synthetic volumes with real ones; each is a folder, a list file, or statistics saved before (.npz).

    `features` names an extractor (or is one; by default `maisi-slices`, or that of saved statistics), `profile` the
    preprocessing, of which `changes` replaces values. `bootstrap` is the number of resamples of the interval, by default
    100, or 20 with more than 512 features; `baseline` is `split` or `none`. With `save_to` the statistics of `real` are
    written there, and `synth` may be left out. Under torchrun or accelerate each process computes its share of the features,
    and only the first returns the comparison; the others return None, as does a call without `synth`. Raises `UsageError`
    for sets, statistics and caches that do not belong together.
    """
    sources = [Path(real)] + ([] if synth is None else [Path(synth)])
    _check_wishes(metrics, baseline, num_images=num_images, bootstrap=bootstrap, batch=batch)
    if synth is None and save_to is None:
        raise UsageError("there is nothing to compare with", hint="give a second set, or --save FILE to keep the statistics of the first")
    if save_to is not None:
        refuse_overwriting(Path(save_to), force=force)
    kind = find_modality(modality).kind
    saved = [load_statistics(source) if source.suffix == ".npz" and source.is_file() else None for source in sources]
    known = next((each for each in saved if each is not None), None)
    using = features if isinstance(features, Extractor) else None
    if using is None and (None in saved or features is not None):
        using = open_extractor(str(features or (known.extractor["name"] if known else OURS)))
    wanted = _profile(using, profile, changes, kind, known)
    for each in saved:
        if each is not None:
            same_profile(wanted, each.profile.as_dict(), each.source)
            same_extractor(using.as_dict() if using else saved[0].extractor, each.extractor, each.source)  # type: ignore[union-attr]
            if num_images is not None and num_images < each.volumes:
                raise UsageError(f"{each.source} is of {each.volumes} volumes, of which --num-images cannot draw",
                                 hint="leave it out, or give the volumes themselves")  # fmt: skip
    listed = [cases(source) if each is None else [] for source, each in zip(sources, saved, strict=True)]
    if using is not None:
        check_channels(using, wanted)
    with team() as crew, contextlib.ExitStack() as stack:
        listen = on_event if not crew.rank else ignore
        sets = list(saved)
        if using is not None and any(listed):
            folder = Path(cache) if cache is not None else Path(crew.share(stack.enter_context(_scratch(crew))))
            store = Cache(folder=folder, extractor=using, profile=wanted)
            if not crew.rank:
                store.check()
            crew.gather(None)  # the cache is whose it should be before any process writes to it
            where = crew.device(device_named, device)
            using.to(where)
            for k, found in enumerate(listed):
                if not found:
                    continue
                side = ("real", "synth")[k]
                if num_images is not None and len(found) < num_images:
                    listen(Note(text=f"{side} has {len(found)} volumes, fewer than the {num_images} asked for", level="warning"))
                taken = chosen(found, num_images, wanted.order, seed)
                sets[k] = _collect(sources[k], taken, store, crew, side=side, modality=modality, labels="organs" in metrics,
                                   device=where, batch=batch, on_event=listen)  # fmt: skip
        if crew.rank:
            return None
        first = sets[0]
        assert first is not None
        if baseline == "split" and first.stored:
            listen(Stage(name="baseline", detail="halves of real against each other"))
            first = replace(first, baseline=_halves(first, _SPLITS if first.dimensions <= _MANY_FEATURES else 3, seed))
        if save_to is not None:
            listen(Saved(path=save(first, Path(save_to), force=force), kind="statistics"))
        if synth is None:
            return None
        second = sets[1]
        assert second is not None
        return _compared(
            first, second, metrics=metrics, bootstrap=bootstrap, seed=seed, kind=kind, baseline=baseline == "split", on_event=listen
        )


def _check_wishes(metrics: Sequence[str], baseline: str, *, num_images: int | None, bootstrap: int | None, batch: int | None) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS, see="maisi fid --help")
    if baseline not in ("split", "none"):
        raise unknown("baseline", baseline, ("split", "none"), see="maisi fid --help")
    for what, number, least in (("images", num_images, 1), ("resamples", bootstrap, 0), ("slices at once", batch, 1)):
        if number is not None and number < least:
            raise UsageError(f"{number} {what} are too few", hint=f"use {least} or more")


@contextlib.contextmanager
def _scratch(crew: Team) -> Iterator[str]:
    """Give a folder for this call's features, made and removed by the first process."""
    if crew.rank:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="maisi-fid-") as folder:
        yield folder


def _profile(
    using: Extractor | None, wanted: str | Profile | None, changes: Mapping[str, Any] | None, kind: str, saved: Statistics | None
) -> Profile:
    """Return the profile that is asked for, else that of saved statistics, else the extractor's own."""
    if isinstance(wanted, Profile):
        found = wanted
    elif wanted is not None:
        found = find_profile(wanted)
    elif saved is not None:
        found = saved.profile
    else:
        assert using is not None
        found = find_profile(using.profiles[kind])
    return found.changed(**changes) if changes else found


def _compared(
    real: Statistics, synth: Statistics, *, metrics: Sequence[str], bootstrap: int | None, seed: int, kind: str, baseline: bool,
    on_event: OnEvent,
) -> Comparison:  # fmt: skip
    notes: list[str] = []
    fid = _averaged({plane: distances.frechet(real.planes[plane].moments, synth.planes[plane].moments) for plane in PLANES})
    times = bootstrap if bootstrap is not None else 100 if real.dimensions <= _MANY_FEATURES else 20
    fixed = [side for side, each in (("real", real), ("synth", synth)) if not each.stored or each.volumes < 2]
    interval = None
    if len(fixed) == 2:
        notes.append("neither set can be resampled (saved statistics, or one volume), so there is no interval")
    elif times > 1:
        on_event(Stage(name="interval", detail=f"{times} resamples of the volumes"))
        interval = _interval(fid, real, synth, times, seed, on_event)
        if fixed:
            notes.append(f"the interval is of resampling the other set only: {fixed[0]} is saved statistics, or one volume")
    halves = _baseline(real, synth) if baseline else None
    if baseline and halves is None:
        notes.append("there is no baseline: it needs four real volumes, or statistics that were saved with one")
    kid = prdc = organs = None
    if "kid" in metrics and real.stored and synth.stored:
        kid = _kid(real, synth, seed)
    if "kid" in metrics and kid is None:
        notes.append("there is no kernel distance: it needs the slices of three volumes on either side, and saved statistics hold none")
    if "prdc" in metrics and min(real.volumes, synth.volumes) > 1:
        found = distances.prdc(_described(real), _described(synth))
        prdc = {"precision": found.precision, "recall": found.recall, "density": found.density, "coverage": found.coverage, "k": found.k,
                "of": "volumes"}  # fmt: skip
    if "prdc" in metrics and prdc is None:
        notes.append("there is no precision or recall: they need two volumes on either side")
    if "organs" in metrics:
        organs = _organs(real, synth, notes)
    sides = {"real": real, "synth": synth}
    return Comparison(
        fid=fid, ci95=interval, baseline=halves, kid=kid, prdc=prdc, organs=organs,
        n_volumes={side: each.volumes for side, each in sides.items()},
        n_slices={side: {**{plane: int(each.planes[plane].moments.n) for plane in PLANES},
                         "total": int(sum(each.planes[plane].moments.n for plane in PLANES))} for side, each in sides.items()},
        effective_n={side: round(min(each.planes[plane].effective for plane in PLANES), 1) for side, each in sides.items()},
        features=dict(real.extractor), profile=real.profile.as_dict(), warnings=_warnings(real, synth, kind), notes=tuple(notes),
    )  # fmt: skip


def _averaged(values: Mapping[str, float]) -> dict[str, float]:
    return {**values, "average": float(np.mean([values[plane] for plane in PLANES]))}


def _interval(fid: Mapping[str, float], real: Statistics, synth: Statistics, times: int, seed: int, on_event: OnEvent) -> dict[str, Any]:
    """Return the 95 % interval of each FID from resampling the volumes of both sets.

    A resample holds fewer different volumes than the set, which raises its FID as a smaller set would (`bias`); the interval
    is the spread of the resamples, laid about the estimate.
    """
    values = np.zeros((times, len(PLANES)))
    draws = [distances.bootstrap_weights(each.volumes, times, seed + k) for k, each in enumerate((real, synth))]
    for column, plane in enumerate(PLANES):
        sides = [_resampled(each, weights, plane) if each.stored else iter([each.planes[plane].moments] * times)
                 for each, weights in zip((real, synth), draws, strict=True)]  # fmt: skip
        for row, (one, other) in enumerate(zip(*sides, strict=True)):
            values[row, column] = _fid(one, other)
            on_event(Step(stage="interval", done=column * times + row + 1, total=times * len(PLANES)))
    found: dict[str, Any] = {}
    bias = {}
    for name, samples in (*((plane, values[:, k]) for k, plane in enumerate(PLANES)), ("average", values.mean(axis=1))):
        centre = float(np.nanmean(samples))
        low, high = (float(value) for value in np.nanpercentile(samples, (2.5, 97.5)))
        found[name] = [max(0.0, fid[name] + low - centre), fid[name] + high - centre]
        bias[name] = centre - fid[name]
    return {**found, "bias": bias, "resamples": times}


def _baseline(real: Statistics, synth: Statistics) -> dict[str, Any] | None:
    """Return the FID of real against real: of halves as measured, and `at_these_sizes`, scaled to the sizes compared.

    The FID of two samples of one distribution falls as 1/n1 + 1/n2 (Chong and Forsyth 2020), which is the scale.
    """
    if not len(real.baseline):
        return None
    half = real.volumes // 2
    scale = (1 / real.volumes + 1 / synth.volumes) / (2 / half)
    measured = _averaged({plane: float(real.baseline[:, k].mean()) for k, plane in enumerate(PLANES)})
    averages = real.baseline.mean(axis=1)
    return {**measured, "low": float(averages.min()), "high": float(averages.max()), "volumes": half, "splits": len(averages),
            "method": "split", "at_these_sizes": {name: value * scale for name, value in measured.items()}}  # fmt: skip


def _kid(real: Statistics, synth: Statistics, seed: int) -> dict[str, Any] | None:
    """Return the kernel distance per plane; the error of the average is the mean error, as the planes are of the same volumes."""
    found: dict[str, Any] = {}
    drawn = [_rows(each, seed + k) for k, each in enumerate((real, synth))]
    for plane in PLANES:
        (one, groups), (other, other_groups) = (each[plane] for each in drawn)
        if min(len(np.unique(groups)), len(np.unique(other_groups))) < 3:
            return None
        each = distances.kid(one, other, groups=groups, other_groups=other_groups)
        found[plane] = {"value": each.value, "error": each.error}
    average = {key: float(np.mean([found[plane][key] for plane in PLANES])) for key in ("value", "error")}
    return {**found, "average": average, "slices": min(len(rows) for each in drawn for rows, _ in each.values())}


def _rows(found: Statistics, seed: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return at most 2000 random slices of each plane, with the number of the volume that each is of."""
    rng = np.random.default_rng([0x6B6964, seed])
    picks: dict[str, NDArray[np.int64]] = {}
    for plane in PLANES:
        n = int(found.planes[plane].counts.sum())
        picks[plane] = np.sort(rng.choice(n, min(n, _KID_ROWS), replace=False))
    rows: dict[str, list[NDArray[np.float32]]] = {plane: [] for plane in PLANES}
    groups: dict[str, list[NDArray[np.int64]]] = {plane: [] for plane in PLANES}
    firsts = dict.fromkeys(PLANES, 0)
    for number, path in enumerate(found.stored):
        features = _load(path)
        for plane in PLANES:
            n = len(features[plane])
            inside = picks[plane][(picks[plane] >= firsts[plane]) & (picks[plane] < firsts[plane] + n)] - firsts[plane]
            rows[plane].append(features[plane][inside])
            groups[plane].append(np.full(len(inside), number))
            firsts[plane] += n
    return {plane: (np.concatenate(rows[plane]), np.concatenate(groups[plane])) for plane in PLANES}


def _described(found: Statistics) -> NDArray[np.float64]:
    """Return one row a volume: the mean features of its planes, one after the other."""
    return np.concatenate([found.planes[plane].means for plane in PLANES], axis=1)


def _organs(real: Statistics, synth: Statistics, notes: list[str]) -> dict[str, Any] | None:
    """Return distances of organ volumes and intensities: per organ, and as a Frechet distance over those that most masks show.

    Volumes (their logarithm) and median intensities are scaled by the mean and standard deviation of the real ones; the
    distance per organ is the first Wasserstein distance. Organs of fewer than five volumes on a side are left out.
    """
    from scipy.stats import wasserstein_distance

    from .anatomy import maisi

    tables = [[each for each in side.organs if each is not None] for side in (real, synth)]
    if min(len(each) for each in tables) < 5:
        notes.append("there is no distance of organs: it needs label maps beside at least five images of either set")
        return None
    per: dict[str, Any] = {}
    common = []
    for label in sorted({label for table in tables for each in table for label in each}):
        shown = [[each[label] for each in table if label in each] for table in tables]
        if min(len(each) for each in shown) < 5:
            continue
        one, other = (np.array([(np.log(ml), value) for ml, value in each]) for each in shown)
        spread = np.maximum(one.std(axis=0, ddof=1), (1e-3, 1e-1))
        distance = [float(wasserstein_distance(one[:, k] / spread[k], other[:, k] / spread[k])) for k in (0, 1)]
        name = maisi().name_of(label) or f"label {label}"
        per[name] = {"volume": distance[0], "intensity": distance[1], "real": len(one), "synth": len(other)}
        if all(len(each) >= 0.8 * len(table) for each, table in zip(shown, tables, strict=True)):
            common.append(label)
    rows = [np.array([[value for label in common for value in (np.log(each[label][0]), each[label][1])]
                      for each in table if all(label in each for label in common)]) for table in tables]  # fmt: skip
    frechet = None
    if common and min(len(each) for each in rows) >= 5:
        centre, spread = rows[0].mean(axis=0), np.maximum(rows[0].std(axis=0, ddof=1), 1e-3)
        scaled = [Moments.of((each - centre) / spread) for each in rows]
        frechet = distances.frechet(*scaled) / (2 * len(common))
    return {"frechet": frechet, "frechet_of": {"organs": len(common), "real": len(rows[0]), "synth": len(rows[1])}, "per_organ": per}


def _warnings(real: Statistics, synth: Statistics, kind: str) -> tuple[str, ...]:
    found: list[str] = []
    dimensions = real.dimensions
    note = str(real.extractor.get("note", ""))
    if note:
        found.append(f"{real.extractor['name']}: {note}")
    if real.extractor["name"] == OURS and kind != "ct":
        found.append(f"{OURS} was trained on CT; for {kind} its features say less")
    for side, each in (("real", real), ("synth", synth)):
        slices = int(min(each.planes[plane].moments.n for plane in PLANES))
        effective = min(each.planes[plane].effective for plane in PLANES)
        if each.volumes < FEW_VOLUMES:
            found.append(
                f"{side} has {each.volumes} volumes: below {FEW_VOLUMES} an FID is mostly its own bias; read it against the baseline"
            )
        if slices < FEW_SLICES:
            found.append(f"{side} has {slices} slices of a plane: below {FEW_SLICES} an FID is not comparable to published ones")
        if effective < dimensions:
            found.append(f"the slices of {side} count as {effective:.0f} independent ones, fewer than the {dimensions} features")
    more, fewer = max(real.volumes, synth.volumes), min(real.volumes, synth.volumes)
    if more > 1.5 * fewer:
        found.append(f"the sets differ in size ({real.volumes} and {synth.volumes} volumes), and FID depends on it")
    if real.profile.spacing_mm is None:
        typical = [np.median(np.asarray(each.spacing_mm), axis=0) for each in (real, synth)]
        if np.abs(np.log(typical[0] / typical[1])).max() > 0.1:
            texts = [format_triple(round(float(value), 3) for value in each) for each in typical]
            found.append(f"the voxels differ ({texts[0]} and {texts[1]} mm): add --spacing to compare the same scale")
    shared = len(set(real.sha256) & set(synth.sha256))
    if shared:
        found.append(f"{shared} files are the same in both sets")
    for side, each in (("real", real), ("synth", synth)):
        twice = each.volumes - len(set(each.sha256))
        if twice:
            found.append(f"{side} holds {twice} files twice")
    return tuple(found)
