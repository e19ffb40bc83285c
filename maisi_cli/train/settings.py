"""The settings of a training run and how a preset's `[train]` table becomes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown

KINDS = ("vae", "dm", "controlnet", "mask-vae", "mask-dm")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The settings of a training run: `[train]` of a preset under `presets/train/`, overridden by `--set train.KEY=`.

    A run ends after `steps`, or earlier after `max_minutes`; the learning rate rises over `warmup_steps` and falls to
    `lr * final_lr` along the `schedule`, by whichever of the two is further on. A step sees `batch_size` times `accumulate`
    samples in each process; `preview_every` 0 makes no previews; `overfit` N trains on N cases alone.
    Cases of `fold` are held out.
    """

    kind: str
    model: str = "nano-ct"
    # the run
    steps: int = 1000
    max_minutes: float | None = None
    batch_size: int = 1
    accumulate: int = 1
    optimiser: str = "adamw"
    lr: float = 1e-4
    schedule: str = "cosine"
    final_lr: float = 0.02
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "no"
    fast: bool = True
    recompute: bool = False
    compile: bool = False
    on_nan: str = "skip"
    seed: int = 0
    validate_every: int = 250
    preview_every: int = 0
    save_every: int = 250
    keep_last: int = 1
    trackers: tuple[str, ...] = ()
    overfit: int | None = None
    device: str = "auto"
    # weights to start from
    vae: str | None = None
    unet: str | None = None
    init: str | None = None
    init_partial: bool = False
    # the data
    fold: int = 0
    # what is drawn
    crops: tuple[tuple[int, int, int], ...] = ((64, 64, 64),)
    whole_share: float = 0.0
    random_aug: bool = False
    spacing_type: str = "original"
    spacing: tuple[float, float, float] | None = None
    select_channel: int = 0
    cache: float = 1.0
    val_patch_size: tuple[int, int, int] | None = None
    val_window: tuple[int, int, int] | None = None
    # the autoencoder
    loss: str = "l1"
    perceptual: str = "maisi-slices"
    perceptual_weight: float = 0.0
    perceptual_share: float = 0.2
    adversarial_weight: float = 0.0
    adversarial_lr: float | None = None
    adversarial_channels: int = 32
    kl_weight: float = 1e-7
    window_weight: float = 0.0
    edge_weight: float = 0.0
    freeze_encoder: bool = False
    latent_noise: float = 0.0
    # the diffusion model
    modality_dropout: float = 0.1
    modality_generalise: float = 0.1
    timesteps: str = "uniform"
    time_shift: float = 1.0
    # the ControlNet
    train_unet: bool = False
    label_dropout: float = 0.1
    weighted_labels: tuple[str, ...] = ()
    weighted_loss: float = 100.0
    contrastive_weight: float = 0.0
    contrastive_delta: float = 2.0
    replay: str | None = None
    replay_share: float = 0.3
    # the mask generator
    organ_balance: float = 0.0
    size_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("training", self.kind, KINDS, see="maisi train --help")
        self._check_run()
        for name, allowed in (("loss", ("l1", "l2")), ("timesteps", ("uniform", "logit-normal"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"train.{name} is {getattr(self, name)!r}", hint=f"use {' or '.join(allowed)}")
        self._check_vae()
        self._check_masks()
        if self.time_shift <= 0:
            raise UsageError(f"train.time_shift is {self.time_shift}", hint="it must be larger than 0")
        if self.latent_noise < 0:
            raise UsageError(f"train.latent_noise is {self.latent_noise}", hint="use a share of the latent's deviation, such as 0.2, or 0")

    def _check_masks(self) -> None:
        for name in ("organ_balance", "size_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"train.{name} is {getattr(self, name)}", hint="it must be between 0 and 1")

    def _check_vae(self) -> None:
        if self.spacing_type not in ("original", "fixed", "rand_zoom"):
            raise UsageError(f"train.spacing_type is {self.spacing_type!r}", hint="use original, fixed or rand_zoom")
        if self.spacing_type == "fixed" and (self.spacing is None or len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise UsageError("train.spacing_type is fixed, and train.spacing is not three lengths in mm", hint="such as [1.5, 1.5, 2.0]")
        if self.spacing_type == "rand_zoom" and not self.random_aug:
            raise UsageError("train.spacing_type rand_zoom is a random change", hint="set train.random_aug to true")
        if self.adversarial_weight > 0 and any(min(crop) < 32 for crop in self.crops):
            raise UsageError(
                "the discriminator looks at patches of 32 voxels along each axis, or more", hint="set train.crops, such as [[64,64,64]]"
            )
        for name in ("perceptual_weight", "adversarial_weight", "select_channel"):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name} is {getattr(self, name)}", hint="use 0, or more")
        for name in ("perceptual_share", "cache"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"train.{name} is {getattr(self, name)}", hint="it must be between 0 and 1")
        for name in ("val_patch_size", "val_window"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or any(n <= 0 or n % 4 for n in value)):
                raise UsageError(f"train.{name} is {list(value)}", hint="use three multiples of 4, such as [96, 96, 64]")

    def _check_run(self) -> None:
        for name, allowed in (("precision", ("no", "fp32", "bf16", "fp16")), ("schedule", ("cosine", "polynomial", "constant")),
                              ("optimiser", ("adamw", "adam")), ("on_nan", ("skip", "stop"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise UsageError(f"train.{name} is {getattr(self, name)!r}", hint=f"use {' or '.join(allowed)}")
        for name in ("steps", "batch_size", "accumulate", "lr", "eps", "clip_norm", "validate_every", "save_every", "keep_last"):
            if getattr(self, name) <= 0:
                raise UsageError(f"train.{name} is {getattr(self, name)}", hint="it must be larger than 0")
        if self.preview_every < 0:
            raise UsageError(f"train.preview_every is {self.preview_every}", hint="use a number of steps, or 0 for no previews")
        if self.overfit is not None and self.overfit <= 0:
            raise UsageError(f"train.overfit is {self.overfit}", hint="use a number of cases, such as 2")
        if not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise UsageError(f"train.betas is {list(self.betas)}", hint="use two numbers from 0 to below 1, such as [0.9, 0.99]")
        for name in ("final_lr", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"train.{name} is {getattr(self, name)}", hint="it must be between 0 and 1")


def settings_from(kind: str, preset: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainSettings:
    """Read the `[train]` table of a preset (a name under `presets/train/`, or a `.toml` file) and apply overrides.

    Override keys are field names, with or without the prefix `train.`. Raises `UsageError` for an unknown key.
    """
    from ..presets import train_preset

    table = dict(train_preset(str(preset)))
    for key, value in (overrides or {}).items():
        table[key.removeprefix("train.")] = value
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    for key in table:
        if key not in known:
            raise unknown("training setting", key, known, see="maisi train --help")
    table = {key: _frozen(value) for key, value in table.items()}
    if table.setdefault("kind", kind) != kind:
        raise UsageError(f"preset {preset} trains {table['kind']}, not {kind}", hint=f"use  maisi train {table['kind']}")
    return TrainSettings(**table)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
