"""Comparing two sets of volumes: `maisi fid` as a function.

The features of each volume are computed once and written to disk, by one process or several; everything after reads them
volume by volume, in the order of the files, so that neither the number of processes nor that of volumes changes a number or
the memory. FID, kernel distance and the interval are per plane (`xy`, `yz`, `zx`) and for the average of the planes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import distances
from .catalog import modality as find_modality
from .collection import (
    Cache,
    Statistics,
    arrays_of,
    cases,
    chosen,
    collect,
    fid_of,
    halves,
    load_statistics,
    resampled,
    same_extractor,
    same_profile,
    save,
)
from .distances import Moments
from .errors import UsageError, unknown
from .events import Note, OnEvent, Saved, Stage, Step, ignore
from .features import OURS, Extractor, check_channels, open_extractor
from .files import refuse_overwriting
from .geometry import format_triple
from .networks import device_named
from .slices import PLANES, Profile
from .slices import profile as find_profile
from .team import Team, team

METRICS = ("fid", "kid", "prdc", "organs")
SCHEMA = "maisi.fid/1"
FEW_VOLUMES, FEW_SLICES = 50, 2048
_SPLITS, _KID_ROWS, _MANY_FEATURES = 10, 2000, 512


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
                sets[k] = collect(sources[k], taken, store, crew, side=side, modality=modality, labels="organs" in metrics,
                                   device=where, batch=batch, on_event=listen)  # fmt: skip
        if crew.rank:
            return None
        first = sets[0]
        assert first is not None
        if baseline == "split" and first.stored:
            listen(Stage(name="baseline", detail="halves of real against each other"))
            first = replace(first, baseline=halves(first, _SPLITS if first.dimensions <= _MANY_FEATURES else 3, seed))
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
    against = _baseline(real, synth) if baseline else None
    if baseline and against is None:
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
        fid=fid, ci95=interval, baseline=against, kid=kid, prdc=prdc, organs=organs,
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
        sides = [resampled(each, weights, plane) if each.stored else iter([each.planes[plane].moments] * times)
                 for each, weights in zip((real, synth), draws, strict=True)]  # fmt: skip
        for row, (one, other) in enumerate(zip(*sides, strict=True)):
            values[row, column] = fid_of(one, other)
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
        features = arrays_of(path)
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
