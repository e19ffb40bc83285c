"""The pipeline of `generate` on one page: mask, noise, sampling, decoding, check, files.

>>> from maisi_cli import generate
>>> for sample in generate(preset="chest-abdomen", seed=7, out="run"):  # doctest: +SKIP
...     print(sample.paths["image"], sample.verdict.passed)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from . import decoding, engines, masks, networks, planning, quality, record, sampling, weights
from .anatomy import maisi
from .catalog import ModelSpec
from .catalog import modality as find_modality
from .catalog import model as find_model
from .engines import making
from .errors import Rejected, UsageError
from .events import Event, Note, OnEvent, Saved, Stage, Step, ignore
from .files import refuse_overwriting, require_folder, write_atomic
from .geometry import Geometry
from .manifest import resolve_all
from .plugins import plugins
from .preview import preview
from .repair import without_lesions
from .seeds import derive, fresh
from .settings import Resolved, Setting, parse_shard, require_weights, sample_id
from .volumes import AIR_HU, Mask, Sample, Volume, onto

if TYPE_CHECKING:
    from .quality import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One sample to make: its place in the run, the name of its files, and which of several settings it is made with."""

    index: int
    seed: int
    id: str
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """What one attempt made, and how long its stages took."""

    attempt: int
    seed: int
    image: Volume | None
    mask: Mask | None
    about: Mapping[str, Any]
    verdict: Verdict | None
    latent: torch.Tensor | None
    seconds: Mapping[str, float]
    hashes: Mapping[str, str]
    engines: Mapping[str, Any]


def generate(settings: Resolved | Sequence[Resolved] | None = None, *, on_event: OnEvent = ignore, **values: Any) -> Iterator[Sample]:
    """Make the samples that the settings ask for, one after another; files are complete when a sample is yielded.

    `settings` is what `settings.resolve` returns, or `manifest.resolve_all` for the rows of a manifest; without it `values` are
    resolved (`preset="abdomen", count=3`). Everything that can be refused is refused here, before the first network is loaded: wrong
    volumes, masks and names (`UsageError`), weights or memory that are missing (`CannotRun`), files that exist. Sample `index` depends
    on the seed and its index alone. Raises `Rejected` at the end when samples failed the quality check and were not kept.
    """
    if settings is None:
        settings = resolve_all(values)
    batch = _Batch([settings] if isinstance(settings, Resolved) else settings, on_event)
    todo = batch.jobs()
    executor: Callable[[Iterable[Job], Make, OnEvent], Iterator[Sample]] = plugins().registry("executors").get(batch.executor)
    return _finish(executor(todo, batch, batch.tell), len(todo))


def _finish(samples: Iterator[Sample], wanted: int) -> Iterator[Sample]:
    done = 0
    for sample in samples:
        done += 1
        yield sample
    if done < wanted:
        raise Rejected(
            f"{wanted - done} of {wanted} samples failed the quality check and were not written",
            hint="see what failed with --on-qc-fail keep, or raise --retries",
        )


class Make(Protocol):
    """Makes the samples of a run."""

    def __call__(self, job: Job) -> Sample | None:
        """Make one sample with its files; None when it failed the check and is not kept."""

    def start(self, job: Job) -> Callable[[], Sample] | None:
        """Make one sample but for its files, which what is returned writes, in whatever thread calls it."""


def run_local(jobs: Iterable[Job], make: Make, on_event: OnEvent) -> Iterator[Sample]:
    """Make the samples in this process, in order; the executor `local`. Files are written while the next sample is computed."""
    waiting: Future[Sample] | None = None
    with ThreadPoolExecutor(1) as pool:
        for job in jobs:
            try:
                finish = make.start(job)
            except BaseException:
                if waiting is not None:
                    yield waiting.result()
                raise
            if waiting is not None:
                yield waiting.result()
            waiting = pool.submit(finish) if finish is not None else None
        if waiting is not None:
            yield waiting.result()


class _Batch:
    """The settings of one run, or those of each row of a manifest."""

    def __init__(self, resolved: Sequence[Resolved], on_event: OnEvent) -> None:
        drawn = next((_seed_for(each) for each in resolved if each.settings.seed is None), None)  # one for all that name none
        self.resolved = [_with_seed(each, *drawn) if drawn and each.settings.seed is None else each for each in resolved]
        self.executor = resolved[0].settings.executor
        self.listener = on_event
        self.loaded = networks.Loaded()
        self.engines = making.Engines(self.tell)
        self._told: set[str] = set()
        self._open: tuple[int, _Run] | None = None

    def tell(self, event: Event) -> None:
        """Pass an event on to the caller and to plugins that listen."""
        self.listener(event)
        plugins().manager.hook.on_event(event=event)

    def jobs(self) -> list[Job]:
        """Check all settings, and return the samples to make; what was chosen for the user is told once."""
        found: list[Job] = []
        for row, resolved in enumerate(self.resolved):
            run = _Run(resolved, self.tell, self.loaded, self.engines)
            jobs = [dataclasses.replace(job, row=row) for job in run.jobs()]
            if jobs:
                run.require()
                for note in (*run.notes(), *run.idle()):
                    if note not in self._told:
                        self._told.add(note)
                        self.tell(Note(text=note))
            found += jobs
            self._open = (row, run)
        return found

    def __call__(self, job: Job) -> Sample | None:
        """Make one sample with its files."""
        finish = self.start(job)
        return None if finish is None else finish()

    def start(self, job: Job) -> Callable[[], Sample] | None:
        """Make one sample but for its files; the settings of its row are opened once, and closed for the next."""
        if self._open is None or self._open[0] != job.row:
            run = _Run(self.resolved[job.row], self.tell, self.loaded, self.engines)
            run.require()
            self._open = (job.row, run)
        return self._open[1].start(job)


class _Run:
    """One run: what is fixed for all of its samples; its networks are loaded when the first sample needs them."""

    def __init__(self, resolved: Resolved, tell: OnEvent, loaded: networks.Loaded, compiled: making.Engines) -> None:
        self.resolved, self.settings = resolved, resolved.settings
        self.tell, self.loaded, self.compiled = tell, loaded, compiled
        self.ran: Mapping[str, Any] = {}
        self.spec: ModelSpec = find_model(self.settings.model)
        self.out = Path(self.settings.out)
        self.parts = self.spec.parts_for(self.settings.mode)
        self.source: str | None = None
        self.reason = ""
        if self.settings.mode != "image":
            self.source, self.reason = masks.choose(self.settings, self.spec)
        self.own_mask = self._own_mask()
        self.plan = planning.plan(resolved, geometry=self.own_mask.geometry if self.own_mask else None)
        self.masks = self._open_source()
        self.mask_parts: tuple[str, ...] = getattr(self.masks, "parts", ())
        self.device = str(self.plan.choice("device")) if self.parts or self.mask_parts else "cpu"
        self.files: dict[str, Path] = {}
        self.hashes: Mapping[str, str] = {}

    def require(self) -> None:
        """Refuse what this machine cannot do."""
        sampling.require_family(self.spec, self.settings.scheduler, compat=self.settings.compat == "reference")
        require_folder(self.out)
        require_weights(self.spec, self.settings.mode)
        self.files = weights.locate(self.spec, (*self.parts, *self.mask_parts))
        if self.parts or self.mask_parts:
            planning.require_fit(self.plan)
            self.device = str(networks.device_named(self.device))
            wish = engines.wish(self.settings.engine, self.settings.trt)
            if wish.must:
                engines.require(wish.backend, device=self.device, precision=str(self.plan.choice("dtype")))

    def notes(self) -> list[str]:
        """Return the choices that were made for the user."""
        return [*self.resolved.notes, *([self.reason] if self.reason else []), *self.plan.warnings]

    def idle(self) -> list[str]:
        """Say that a GPU has nothing to do, where there is one and no network runs."""
        unused = not self.parts and not self.mask_parts and self.plan.choice("device") != "cpu"
        return ["mode mask runs no network: it uses the processor, not the GPU"] * unused

    def _open_source(self) -> masks.Source | None:
        """Open the source of masks: what it cannot do is refused here."""
        if self.source is None:
            return None
        device, dtype = str(self.plan.choice("device")), str(self.plan.choice("dtype"))
        return masks.open_source(
            self.source, self.settings, self.spec, device=device, dtype=dtype, typed=self.resolved.typed(), loaded=self.loaded
        )

    def jobs(self) -> list[Job]:
        """Return the samples to make here: this shard's, without those that are complete when resuming."""
        settings = self.settings
        assert settings.seed is not None
        share, shares = parse_shard(settings.shard) if settings.shard else (1, 1)
        found = []
        for index in range(settings.count) if self.resolved.index is None else [self.resolved.index]:
            if index % shares != share - 1:
                continue
            job = Job(index=index, seed=settings.seed, id=sample_id(settings, self.spec, index))
            outputs = self._outputs(job)
            if settings.resume and self._complete(job):
                self.tell(Note(text=f"{job.id} is complete"))
                continue
            if not settings.resume:
                for path in outputs:
                    refuse_overwriting(path, force=settings.force)
            found.append(job)
        return found

    def start(self, job: Job) -> Callable[[], Sample] | None:
        """Make one sample but for its files, with retries; None when it failed the check and is not kept."""
        settings = self.settings
        tries = settings.retries + 1 if settings.on_qc_fail == "retry" else 1
        made: _Try | None = None
        for attempt in range(tries):
            last = attempt + 1 == tries
            try:
                made = self._attempt(job, attempt)
            except masks.NoMask as error:
                if last and settings.count == 1 and self.resolved.index is None:  # of many samples the others are made
                    raise
                self.tell(Note(text=f"{job.id}: {error.message}" + ("" if last else "; trying again"), level="warning"))
                continue
            if made.verdict is None or made.verdict.passed or settings.on_qc_fail == "keep":
                return functools.partial(self._save, job, made)
            failed = "; ".join(finding.text for finding in made.verdict.failures())
            self.tell(Note(text=f"{job.id} failed the check: {failed}" + ("" if last else "; trying again"), level="warning"))
        if settings.keep_latent:
            (self.out / f"{job.id}_latent.npy").unlink(missing_ok=True)
        return None

    # --- one attempt ------------------------------------------------------------------------

    def _attempt(self, job: Job, attempt: int) -> _Try:
        settings, clock = self.settings, _Clock()
        seed = derive(job.seed, job.index, attempt)
        with clock("mask"):
            made = self._mask(job, attempt)
        mask, about = (made.mask, made.about) if made else (None, {})
        if settings.mode == "mask":
            return _Try(attempt=attempt, seed=seed, image=None, mask=mask, about=about, verdict=None, latent=None, seconds=clock.seconds,
                        **self._used())  # fmt: skip
        grid = mask.geometry if mask is not None else settings.geometry()
        fitted = masks.conditioned(mask, self.spec) if mask is not None else None
        inner = fitted.shown.geometry if fitted else grid
        if fitted and fitted.hidden:
            names = ", ".join(map(maisi().name_of, fitted.hidden))
            self.tell(Note(text=f"{job.id}: {self.spec.name} never saw a {names}: the image shows the organ instead", level="warning"))
            about = {**about, "not_drawn": list(fitted.hidden)}
        nets = self._load(inner, paired=fitted is not None)
        with clock("denoise"):
            latent = self._denoise(nets, inner, fitted, seed)
        if settings.keep_latent:
            write_atomic(self.out / f"{job.id}_latent.npy", _npy(latent))
        with clock("decode"):
            decoder = self.plan.choice("decoder")
            self.tell(Stage(name="decode", detail=str(decoder), sample=job.index))
            array = decoding.decode_image(
                nets, latent, settings.modality, decoder=decoder, sweeps=self.plan.choice("sweeps") if decoder == "exact" else "store",
                window=self.plan.choice("window"), overlap=self.plan.choice("overlap") or 0.0, on_event=self.tell,
            )  # fmt: skip
            image = onto(Volume(array=array, geometry=inner, modality=settings.modality), grid)
            if mask is not None:
                _clear_outside(image, mask)
        verdict = quality.check(
            image, mask, required=settings.anatomy, compat=settings.compat == "reference", own_mask=self.source == "file",
            chosen=quality.chosen_organs(settings.anatomy_size), tiles=self._tiles(inner, grid),
        )  # fmt: skip
        return _Try(attempt=attempt, seed=seed, image=image, mask=mask, about=about, verdict=verdict, latent=latent, seconds=clock.seconds,
                    **self._used())  # fmt: skip

    def _used(self) -> dict[str, Any]:
        """Return what this sample was made with: its files may be written when the next one has begun."""
        return {"hashes": {**self.hashes, **getattr(self.masks, "hashes", {})}, "engines": {**self.ran, **getattr(self.masks, "ran", {})}}

    def _tiles(self, inner: Geometry, grid: Geometry) -> quality.Planes | None:
        """Return the planes where the decoder's windows met, in voxels of `grid`; None where it had none."""
        window = self.plan.choice("window")
        if self.plan.choice("decoder") != "window" or window is None or inner != grid:
            return None
        return quality.tile_planes(grid.size, window, self.plan.choice("overlap") or 0.0, factor=self.spec.latent_factor)

    def _mask(self, job: Job, attempt: int) -> masks.Made | None:
        if self.masks is None:
            return None
        seed = derive(job.seed, job.index, attempt, "mask")
        if self.own_mask is not None:
            return masks.painted(self.own_mask, self.settings, seed)
        self.tell(Stage(name="mask", detail=str(self.source), sample=job.index))
        made = self.masks(self.settings, self.settings.geometry(), seed, on_event=self.tell)
        return made if isinstance(made, masks.Made) else masks.Made(mask=made)

    def _own_mask(self) -> Mask | None:
        """Read the user's mask once, before anything else is done."""
        return masks.own(self.settings, spec=self.spec, on_event=self.tell) if self.source == "file" else None

    def _denoise(self, nets: networks.Networks, grid: Geometry, fitted: masks.Conditioned | None, seed: int) -> torch.Tensor:
        settings, spec = self.settings, self.spec
        size = grid.latent_size(spec.latent_factor)
        sampler: sampling.Sampler = plugins().registry("samplers").get(settings.scheduler)
        compat = settings.compat == "reference"
        schedule = sampling.FAMILIES[sampling.family_of(sampler)](
            settings.steps, size, base_voxels=int(spec.scheduler.get("base_voxels", 32**3)), compat=compat
        )
        regions = _region_indices(settings.regions)
        condition = networks.Condition(
            spacing_mm=grid.spacing,
            modality=find_modality(settings.modality).id,
            top_region=fitted.top_region if fitted and fitted.top_region is not None else regions[0],
            bottom_region=fitted.bottom_region if fitted and fitted.bottom_region is not None else regions[1],
            labels=torch.from_numpy(fitted.shown.array)[None, None] if fitted else None,
            **self._tumor_guidance(fitted),
            cfg_modality=settings.cfg_modality,
            cfg_mask=settings.cfg_mask if fitted else 0.0,
            compat=compat,
            compat_half_spacing=compat and self.source in ("file", "diffusion"),
        )
        noise = sampling.initial_noise((1, spec.latent_channels, *size), seed).to(nets.device)
        if compat and fitted is not None:  # the reference's pipelines with a mask hold latents in float16
            noise = noise.half().float()
        generator = torch.Generator().manual_seed(derive(seed, 0, 0, "steps"))
        self.tell(Stage(name="denoise", detail=f"{settings.scheduler}, {settings.steps} steps, {nets.device}, {nets.precision.name}"))

        def on_step(done: int, total: int, _latent: torch.Tensor) -> None:
            self.tell(Step(stage="denoise", done=done, total=total))

        latent = sampler(nets.denoiser(condition), noise, schedule, on_step=on_step, generator=generator)
        if not bool(torch.isfinite(latent).all()):
            raise Rejected(f"the sampler {settings.scheduler} diverged: the latent is not finite", hint="use --dtype fp32, or more --steps")
        return latent

    def _tumor_guidance(self, fitted: masks.Conditioned | None) -> dict[str, Any]:
        """Return the scale of the tumour guidance and the mask without its tumour; nothing where the mask has none."""
        if not self.settings.cfg_tumor or fitted is None:
            return {}
        labels = fitted.shown.array
        without = without_lesions(labels, compat=self.settings.compat == "reference")
        if np.array_equal(without, labels):
            self.tell(Note(text="--cfg-tumor does nothing here: the mask has no tumour", level="warning"))
            return {}
        return {"cfg_tumor": self.settings.cfg_tumor, "labels_without_tumor": torch.from_numpy(without)[None, None]}

    def _load(self, grid: Geometry, *, paired: bool) -> networks.Networks:
        """Return the networks for a volume, with engines in the place of those that run compiled."""
        dtype, graphs = str(self.plan.choice("dtype")), self.settings.cuda_graphs

        def load() -> networks.Networks:
            device = networks.device_named(self.device)
            precision = networks.Precision.named(dtype, device)
            self.tell(Stage(name="load", detail=f"{self.spec.name} on {device}"))
            return networks.load(self.spec, self.parts, device=device, precision=precision, files=self.files, cuda_graphs=graphs)

        nets = self.loaded.get("image", (self.spec.path, self.parts, self.device, dtype, graphs), load)
        self.hashes = nets.hashes
        size = grid.latent_size(self.spec.latent_factor)
        window = self.plan.choice("window")
        seen = size if window is None else tuple(map(min, size, window))  # what the decoder is given at once
        parts = {"unet": size, **({"controlnet": size} if paired else {})}
        wish = engines.wish(self.settings.engine, self.settings.trt)
        nets = self.compiled.fitted(nets, {**parts, "decoder": seen}, self.files, wish, residuals=paired)
        self.ran = making.recorded(nets, (*parts, "decoder"))
        return nets

    # --- files ----------------------------------------------------------------------------

    def _outputs(self, job: Job) -> list[Path]:
        """Return the files and folders that a sample will have and that must not exist before; formats refuse modes here."""
        settings = self.settings
        ends = ["record.json"] + ["preview.png"] * settings.preview + ["latent.npy"] * (settings.keep_latent and settings.mode != "mask")
        names = [f"{job.id}_{end}" for end in ends]
        for save in map(plugins().registry("formats").get, settings.format):
            names += save.names(job.id, settings) if hasattr(save, "names") else []
        return [self.out / name for name in names]

    def _complete(self, job: Job) -> bool:
        """Say whether a sample of these very settings is there with all of its files."""
        path = self.out / f"{job.id}_record.json"
        if not path.is_file():
            return False
        old = record.read(path)
        free = {"out", "count", "resume", "force", "shard", "executor", "retries"}
        now = {key: record.plain(value) for key, value in _values(self.resolved).items() if key not in free}
        before = {key: entry["value"] for key, entry in old["settings"].items() if key not in free}
        changed = sorted(key for key in now if before.get(key) != now[key])
        if changed or old["seed"] != job.seed or old["index"] != job.index:
            what = changed[0] if changed else "the seed"
            raise UsageError(f"{path} was made with another {what}", hint="resume with the settings it was made with, or use another --out")
        return not record.changed_outputs(old, self.out)

    def _save(self, job: Job, made: _Try) -> Sample:
        settings, clock = self.settings, _Clock()
        mask = made.mask
        if mask is not None and settings.compat == "reference" and self.source != "file":
            mask = masks.renumbered(mask, settings)
        sample = Sample(index=job.index, seed=job.seed, id=job.id, image=made.image, mask=mask, verdict=made.verdict)
        self.tell(Stage(name="save", detail=str(self.out), sample=job.index))
        force = settings.force or settings.resume  # what is left of an unfinished sample is replaced
        with clock("save"):
            added: dict[str, Any] = {}
            for answer in plugins().manager.hook.finish_sample(sample=sample, folder=self.out):
                added.update(answer or {})
            paths: dict[str, Path] = {}
            if settings.keep_latent and made.latent is not None:
                paths["latent"] = self.out / f"{job.id}_latent.npy"
            with _nothing_left(paths):
                for name in settings.format:
                    paths.update(plugins().registry("formats").get(name)(sample, self.out, force=force))
                if settings.preview:
                    title = f"{self.spec.name}  seed {job.seed}/{job.index}  SYNTHETIC"
                    paths["preview"] = preview(made.image, made.mask, self.out / f"{job.id}_preview.png", title=title, force=force)
        with _nothing_left(paths):
            written = self._record(job, made, paths, {**made.seconds, **clock.seconds}, added)
            paths["record"] = record.write(self.out / f"{job.id}_record.json", written, force=force)
        for kind, path in paths.items():
            self.tell(Saved(path=path, kind=kind))
        return dataclasses.replace(sample, paths=paths, record=written)

    def _record(
        self, job: Job, made: _Try, paths: Mapping[str, Path], seconds: Mapping[str, float], added: Mapping[str, Any]
    ) -> dict[str, Any]:
        spec, item = self.spec, made.image or made.mask
        assert item is not None
        parts = [{"part": part, "file": self.files[part].name, "sha256": made.hashes.get(part)} for part in (*self.parts, *self.mask_parts)]
        mask: dict[str, Any] | None = None
        if made.mask is not None:
            mask = {"source": self.source, "ids": list(made.mask.ids()), **made.about}
            if made.image is not None and (grid := spec.shown_on(made.mask.geometry)) != made.mask.geometry:
                mask["shown_on"] = {"size": list(grid.size), "spacing_mm": list(grid.spacing)}
            if self.source == "file":
                mask["file"] = {"name": Path(str(self.settings.mask)).name, "sha256": record.sha256_of(str(self.settings.mask))}
        device = {"name": self.device, "dtype": self.plan.choice("dtype"), "threads": torch.get_num_threads(),
                  "engines": dict(made.engines)}  # fmt: skip
        if device["name"].startswith("cuda"):
            device["gpu"] = torch.cuda.get_device_name()
        return record.build(
            id=job.id, index=job.index, seed=job.seed, attempt=made.attempt, derived_seed=made.seed,
            settings=_values(self.resolved), origins={key: setting.origin for key, setting in self.resolved.origins.items()},
            model={"name": spec.name, "licence": spec.licence.name, "commercial": spec.licence.commercial, "weights": parts},
            geometry=item.geometry, modality=self.settings.modality, mask=mask, verdict=made.verdict, outputs=paths,
            seconds={"mask": 0.0, "denoise": 0.0, "decode": 0.0, **seconds}, peak_gib=peak_gib(device["name"]), device=device,
            notes=self.notes(), plugins=added,
        )  # fmt: skip


def sample_json(sample: Sample) -> dict[str, Any]:
    """Return a sample as `generate --json` prints it (schema maisi.sample/1)."""
    timing = sample.record["timing"]
    return {
        "schema": "maisi.sample/1", "id": sample.id, "index": sample.index, "seed": sample.seed, "model": sample.record["model"]["name"],
        **dict.fromkeys(("image", "label", "record", "preview", "latent")), **{kind: str(path) for kind, path in sample.paths.items()},
        "qc": sample.verdict.as_dict() if sample.verdict else None, "seconds": timing["seconds"], "peak_gib": timing["peak_gib"],
    }  # fmt: skip


def peak_gib(device: str) -> float | None:
    """Return the peak memory so far in GiB: what torch allocated on a CUDA device, else this process's resident set.

    None on Windows, which does not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Clock:
    """Seconds by stage; GPUs are waited for, so that a stage is charged with its own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if stage != "save" and torch.cuda.is_available():  # files are written while the next sample is computed
            torch.cuda.synchronize()
        self.seconds[stage] = time.perf_counter() - started


@contextlib.contextmanager
def _nothing_left(paths: Mapping[str, Path]) -> Iterator[None]:
    """Remove the files and folders of a sample that could not be finished: without a record nobody knows what they are."""
    try:
        yield
    except BaseException:
        for path in paths.values():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def _clear_outside(image: Volume, mask: Mask) -> None:
    """Put air (CT) or 0 (MR) into the image where the mask is 0 (reference.md 2.4)."""
    np.putmask(image.array, mask.array == 0, AIR_HU if find_modality(image.modality).kind == "ct" else 0)


def _region_indices(regions: tuple[str, ...]) -> tuple[int | None, int | None]:
    from .anatomy import region_index

    found = sorted(region_index(name) for name in regions)
    return (found[0], found[-1]) if found else (None, None)


def _values(resolved: Resolved) -> dict[str, Any]:
    return {key: getattr(resolved.settings, key) for key in resolved.origins}


def _with_seed(resolved: Resolved, seed: int, origin: Setting) -> Resolved:
    settings = dataclasses.replace(resolved.settings, seed=seed)
    return dataclasses.replace(resolved, settings=settings, origins={**resolved.origins, "seed": origin})


def _seed_for(resolved: Resolved) -> tuple[int, Setting]:
    """Return the seed of the run that is resumed, or a fresh one, and its origin."""
    seed, origin = fresh(), "drawn"
    if resolved.settings.resume:
        found = {int(record.read(path)["seed"]) for path in sorted(Path(resolved.settings.out).glob("*_record.json"))}
        if len(found) > 1:
            raise UsageError(f"{resolved.settings.out} holds samples of {len(found)} runs", hint="name the one to resume with --seed S")
        if found:
            seed, origin = found.pop(), "record"
    return seed, Setting(value=seed, origin=origin)


def _npy(latent: torch.Tensor) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, latent[0].float().cpu().numpy())
    return buffer.getvalue()
