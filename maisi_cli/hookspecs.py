"""The hooks: what a plugin may add to `maisi`, and what it may listen to.

A plugin is a module (or object) whose functions are marked with `hookimpl` and which a package declares under the
entry-point group `maisi`. Everything that comes with `maisi` is registered through these same hooks, in `defaults.py`.

The style is `register(name, "module:attribute")`: a name now, an import only when the thing is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from .events import Event
    from .volumes import Sample

hookspec = pluggy.HookspecMarker("maisi")
hookimpl = pluggy.HookimplMarker("maisi")


class Register(Protocol):
    """Adds one named thing; `summary` is the line that listings show."""

    def __call__(self, name: str, target: Any, *, summary: str = "") -> None: ...


@hookspec
def register_models(register: Register) -> None:
    """Add models: `register("my-ct", path_of_a_model_toml)`.

    The file describes networks, scheduler, limits, licence and weight files; `maisi models show nano-ct` prints one.
    """


@hookspec
def register_samplers(register: Register) -> None:
    """Add samplers (schedulers): `register("ab3", "maisi_solvers:adams_bashforth_3", summary=...)`.

    The target is a function `sampler(denoise, noise, schedule, *, on_step=None, generator=None) -> latent`; see
    `maisi_cli.sampling.Sampler`. It is chosen with `--scheduler ab3`.
    """


@hookspec
def register_mask_sources(register: Register) -> None:
    """Add sources of masks: `register("phantom", "maisi_cli.masks:phantom")`.

    The target is a function `source(settings, geometry, seed, *, on_event) -> Mask`, chosen with `--mask-source`; or a
    class, made once a run as `Target(settings, model, device=..., dtype=...)`, whose instances are such functions. What
    they return may be `maisi_cli.masks.Made`, a mask with what the record shall say about it. The attribute `honours`
    names those of `anatomy_size`, `tumor`, `mask_steps` and `mask_database` that the source takes. A class with `parts`, the
    networks of the model that it loads, also gets `loaded` (`maisi_cli.networks.Loaded`), which keeps them for the next row.
    """


@hookspec
def register_labels(register: Register) -> None:
    """Add labels to the vocabulary, or a remap table: `register("pancreatic cyst", {"id": 133, ...})`.

    The target is a mapping. With `id` (133..199 or 201..255) it is a new label of the MAISI vocabulary; optional keys
    are `group`, `color`, `host` (name of the organ it lies in) and `regions`. With `pairs` (source id to MAISI
    id) it is a remap table for `--labels NAME`, as is the path of a file like that of `maisi labels show totalsegmentator`.
    """


@hookspec
def register_modalities(register: Register) -> None:
    """Add modalities: `register("mr-t1rho", {"id": 34, "kind": "mr", "summary": "T1 rho"})`.

    The id (0..127) is the class that the diffusion model's embedding was trained with.
    """


@hookspec
def register_checks(register: Register) -> None:
    """Add quality checks: `register("hu-median", "maisi_cli.quality:hu_median")`.

    The target is a function `check(image, mask, context) -> list[Finding]`; it runs in `generate` and in `qc`.
    One that looks at labels alone has the attribute `needs_image` = False: `qc` then runs it on a label map without an image,
    with None for the image.
    """


@hookspec
def register_features(register: Register) -> None:
    """Add feature extractors for `maisi fid`: `register("medicalnet", "my_package:medicalnet", summary=...)`.

    The target is a function `open(file=None) -> maisi_cli.features.Extractor`; `file` is what `--features NAME=FILE` names.
    The extractor tells its name, the hash of its weights, licence, channels, number of features and usual profile, which all
    stand in the output. It is chosen with `--features NAME`.
    """


@hookspec
def register_formats(register: Register) -> None:
    """Add output formats: `register("nifti", "maisi_cli.volumes:save_nifti")`, chosen with `--format`.

    The target is a function `save(sample, folder, *, force) -> dict[str, Path]`: the files or folders that it wrote, by kind.
    Decorate it with `maisi_cli.files.writes`, so that a run is refused before its work when they exist already.
    """


@hookspec
def register_presets(register: Register) -> None:
    """Add presets: `register("spine", path_of_a_preset_toml)`."""


@hookspec
def register_executors(register: Register) -> None:
    """Add ways to run many samples: `register("local", "maisi_cli.synthesis:run_local")`.

    The target is a function `run(jobs, make, on_event) -> Iterator[Sample]`; `make(job)` makes a sample with its files, and
    `make.start(job)` one whose files are written by what it returns.
    """


@hookspec
def register_trackers(register: Register) -> None:
    """Add trackers of training: `register("mlflow", "my_package:mlflow", summary=...)`, chosen with `train.trackers`.

    The target is a function `open(out, since) -> Tracker`, see `maisi_cli.train.tracking`: `out` is the run's folder, `since`
    says which steps are known already. The tracker gets the figures that `log.jsonl` has.
    """


@hookspec
def register_commands(register: Register) -> None:
    """Add commands: `register("view", "my_package:view_command")`, a function with Typer's annotations."""


@hookspec
def on_event(event: Event) -> None:
    """Listen to what the engine says: stages, steps, notes, saved files. Exceptions end the run."""


@hookspec
def finish_sample(sample: Sample, folder: Path) -> Mapping[str, Any] | None:
    """Look at a finished sample before its files are written.

    Return a mapping to add under `plugins` in the sample's record, or None.
    """
