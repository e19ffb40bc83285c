"""Training of the VAE, the diffusion model and the ControlNet, from a preset and a data list.

>>> from maisi_cli import train
>>> train("vae", data="data/", out="runs/vae", preset="nano-vae")  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..events import OnEvent, Saved, ignore
from ..record import sha256_of
from .launcher import launch, processes, processes_wanted
from .overfit import only
from .settings import KINDS, TrainSettings, settings_from

__all__ = ["KINDS", "TrainSettings", "settings_from", "train"]


def train(
    kind: str, *, data: str | Path, out: str | Path, preset: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None, resume: str | None = None, force: bool = False, gpus: int | str = 1,
    on_event: OnEvent = ignore,
) -> Path:  # fmt: skip
    """Train one network (one of `KINDS`) on a data list; return the exported weights file.

    `preset` defaults to `nano-<kind>`, for the mask networks to the kind. `resume` is `auto` (continue what is in `out`, if
    anything) or the folder of a checkpoint. `gpus` is a number of processes, or `auto` for one on each GPU; torchrun and
    accelerate start them as well. The weights that training starts from are never written. Raises `UsageError` for bad settings,
    lists and states.
    """
    settings = settings_from(kind, preset or default_preset(kind), overrides)
    arguments: dict[str, Any] = {"data": Path(data), "settings": settings, "out": Path(out), "resume": resume, "force": force}
    count = processes_wanted(gpus, settings.device) if gpus != 1 else 1
    if count > 1:
        return launch(_train_here, count, arguments, on_event)
    return _train_here(**arguments, on_event=on_event)


def default_preset(kind: str) -> str:
    """Return the preset that a training takes where none is named."""
    return kind if kind.startswith("mask-") else f"nano-{kind}"


def _train_here(*, data: Path, settings: TrainSettings, out: Path, resume: str | None, force: bool, on_event: OnEvent) -> Path:
    """Train in this process, as one of those that a launcher started, if any did."""
    from . import controlnet, diffusion, mask_dm, mask_vae, vae
    from .loop import Task, run

    tasks: dict[str, Callable[[TrainSettings, Path], Task]] = {
        "vae": vae.task, "dm": diffusion.task, "controlnet": controlnet.task, "mask-vae": mask_vae.task, "mask-dm": mask_dm.task,
    }  # fmt: skip
    # a task draws the batch of all processes; each of them keeps its part
    together = dataclasses.replace(settings, batch_size=settings.batch_size * processes())
    with only(data, settings.overfit, held_out=getattr(settings, "fold", 0)) as chosen:
        hashes = data_hashes(settings.kind, chosen)
        task = tasks[settings.kind](together, chosen)
    made = run(task, settings, out, resume=resume, force=force, on_event=on_event, data_hashes=hashes)
    if isinstance(task, mask_dm.MaskDiffusionTask):
        on_event(Saved(path=task.write_beside(out), kind="sizes"))
    return made


def data_hashes(kind: str, data: Path) -> dict[str, str]:
    """Return the hash of the list that a training reads, by its name."""
    path = data / ("latents.json" if kind in ("dm", "controlnet") else "list.json") if data.is_dir() else data
    return {f"list {path.name}": sha256_of(path)} if path.is_file() else {}
