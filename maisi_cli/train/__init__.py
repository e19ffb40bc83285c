"""Training of the VAE, the diffusion model and the ControlNet, from a preset and a data list.

>>> from maisi_cli import train
>>> train("vae", data="data/", out="runs/vae", preset="nano-vae")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..events import OnEvent, ignore
from .settings import KINDS, TrainSettings, settings_from

__all__ = ["KINDS", "TrainSettings", "settings_from", "train"]


def train(
    kind: str, *, data: str | Path, out: str | Path, preset: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None, resume: str | None = None, force: bool = False, on_event: OnEvent = ignore,
) -> Path:  # fmt: skip
    """Train one network (`vae`, `dm` or `controlnet`) on a data list; return the exported weights file.

    `preset` defaults to `nano-<kind>`. `resume` is `auto` (continue what is in `out`, if anything) or a state file. The
    weights that training starts from are never written. Raises `UsageError` for bad settings, lists and states.
    """
    from . import controlnet, diffusion, vae
    from .loop import Task, run

    settings = settings_from(kind, preset or f"nano-{kind}", overrides)
    tasks: dict[str, Callable[[TrainSettings, Path], Task]] = {"vae": vae.task, "dm": diffusion.task, "controlnet": controlnet.task}
    return run(tasks[kind](settings, Path(data)), settings, Path(out), resume=resume, force=force, on_event=on_event)
