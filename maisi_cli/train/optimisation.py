"""What moves the weights: the optimiser, its learning rate over a run, and the average that is kept of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .settings import TrainSettings


def optimiser_for(
    settings: TrainSettings, parameters: Iterable[nn.Parameter], device: torch.device, *, lr: float | None = None
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019), or Adam, in torch's fused form where the device has one."""
    kind = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam
    return kind(parameters, lr=settings.lr if lr is None else lr, betas=settings.betas, eps=settings.eps,
                weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))  # fmt: skip


def learning_rate(settings: TrainSettings, step: int, progress: float) -> float:
    """Return the rate of a step: it rises over `warmup_steps` and falls from `lr` to `lr * final_lr` with progress 0 to 1.

    `cosine` is that of Loshchilov and Hutter 2017, `polynomial` falls as (1 - progress)^2, `constant` stays at `lr`.
    """
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    left = 1 - min(max(progress, 0.0), 1.0)
    falls = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "polynomial": left**2, "constant": 1.0}[settings.schedule]
    return settings.lr * warm * (settings.final_lr + (1 - settings.final_lr) * falls)


@torch.no_grad()
def average_into(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Move an exponential average of the weights towards those of now: a <- decay a + (1 - decay) w, in place."""
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)
