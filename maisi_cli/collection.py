"""A set of volumes as `maisi fid` sees it: its files, their features on disk, and the statistics that are kept of them.

The features of each volume are computed once and written to disk, by one process or several; statistics are read from
there volume by volume, in the order of the files.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import distances
from .anatomy import BODY
from .distances import Moments
from .errors import CannotRun, UsageError
from .events import OnEvent, Stage, Step
from .features import Extractor, features_of
from .files import NIFTI_ENDS, refuse_overwriting, stem, write_atomic
from .record import sha256_of
from .slices import PLANES, Profile
from .team import Team
from .volumes import Mask, Volume, read_image, read_mask, require_same_grid

CACHE_SCHEMA, STATISTICS_SCHEMA = "maisi.fid-cache/1", "maisi.fid-statistics/1"
_BUDGET = 2**29
"""Bytes of the sums that are held at once for resamples."""


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


# --- the volumes --------------------------------------------------------------------------------


def cases(source: Path) -> list[Case]:
    """Return the volumes of a folder, or of a list file with a path a line, in alphabetical order.

    In a folder they are the `*_image` files, or where there are none all NIfTI files but label maps. Paths of a list are
    seen from its own folder. Raises `UsageError` for what holds no volume.
    """
    if source.is_dir():
        found = sorted(each for end in NIFTI_ENDS for each in source.rglob(f"*{end}") if each.is_file() and not each.name.startswith("."))
        named = [each for each in found if stem(each).endswith("_image")]
        images = named or [each for each in found if not stem(each).endswith(("_label", "_seg", "_mask"))]
        if not images:
            raise UsageError(f"{source} holds no image (*.nii.gz)", hint="give a folder with volumes, or a list of them")
    elif not source.is_file():
        raise UsageError(f"there is no file or folder {source}", hint="check the path")
    elif source.name.endswith(NIFTI_ENDS):
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
    return [Case(name=stem(each).removesuffix("_image"), image=each, label=_label(each)) for each in images]


def _label(image: Path) -> Path | None:
    name = stem(image).removesuffix("_image")
    return next((each for end in NIFTI_ENDS if (each := image.with_name(f"{name}_label{end}")).is_file()), None)


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


def arrays_of(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz, or those named. Raises `UsageError` for a damaged file."""
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (KeyError, OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path} is damaged", hint="remove it; its features are computed again") from error


# --- statistics ---------------------------------------------------------------------------------


def collect(
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
        found = arrays_of(path)
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
        yield Moments.of(arrays_of(path, plane)[plane])


def resampled(found: Statistics, weights: NDArray[np.float64], plane: str) -> Iterator[Moments]:
    """Yield the moments of a set with its volumes weighted, a row of weights after the other, within a bound of memory."""
    at_once = max(1, _BUDGET // (8 * found.dimensions**2))
    for start in range(0, len(weights), at_once):
        yield from distances.weighted(_parts(found.stored, plane), weights[start : start + at_once])


def halves(found: Statistics, splits: int, seed: int) -> NDArray[np.float64]:
    """Return the FID of random halves of a set, (splits, 3 planes); no row with fewer than four volumes."""
    if found.volumes < 4 or splits < 1:
        return np.zeros((0, len(PLANES)))
    one, other = distances.split_weights(found.volumes, splits, seed)
    columns = []
    for plane in PLANES:
        halves = zip(resampled(found, one, plane), resampled(found, other, plane), strict=True)
        columns.append([fid_of(a, b) for a, b in halves])
    return np.asarray(columns, dtype=np.float64).T


def fid_of(one: Moments, other: Moments) -> float:
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
        arrays = arrays_of(path)
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
