"""From noise to a latent: schedules and samplers as plain functions.

A sampler is a function `sampler(denoise, noise, schedule, *, on_step=None, generator=None) -> latent`. `denoise(x, t)`
returns the network's prediction for a latent (B, 4, x, y, z) at a time t in [0, 1000]; for rectified flow that is the
velocity data - noise, for DDPM it is the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import UsageError

Denoise = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int, Tensor], None]
Noise = torch.Generator | Callable[[Tensor], Tensor]

TRAIN_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The times of a sampler, falling from 1000, and the widths of its steps.

    `times` has one entry per step; `widths` are the steps of a flow in units of the whole path (their sum is 1), empty for
    DDPM. `compat` marks the reference's own tables.
    """

    times: Tensor
    widths: Tensor
    compat: bool = False

    def __len__(self) -> int:
        return len(self.times)


class Sampler(Protocol):
    """Turns noise into a latent; see the module's docstring."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
    ) -> Tensor: ...  # fmt: skip


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Draw N(0, 1) noise of `shape` in one call on the CPU, so that a seed means the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def flow_schedule(steps: int, latent_size: Sequence[int], *, base_voxels: int = 32**3, compat: bool = False) -> Schedule:
    """Return `steps` times of a rectified flow, moved toward noise for large latents.

    u_i = 1 - i / steps; t_i = 1000 r u / (1 + (r - 1) u) with r = (latent voxels / base_voxels)^(1/3) (Esser et al. 2024,
    eq. 23). With `compat` times are rounded to float16 and each next time is truncated to an integer before the step's
    width is taken, as the reference does: its widths add up to 1.007..1.010.
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}", hint="use at least 1, such as --steps 30")
    ratio = torch.tensor(math.prod(latent_size) / base_voxels, dtype=torch.float32) ** (1 / 3)
    u = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64 if not compat else torch.float32)
    ratio = ratio.to(u.dtype)
    if compat:
        u = torch.tensor([(1 - i / steps) * 1000.0 for i in range(steps)], dtype=torch.float32) / 1000
    times = ratio * u / (1 + (ratio - 1) * u) * 1000
    if compat:
        times = times.to(torch.float16)
        following = torch.cat([times[1:], times.new_zeros(1)])
        widths = torch.tensor([(float(t) - int(n)) / 1000 for t, n in zip(times, following, strict=True)], dtype=torch.float64)
        return Schedule(times=times.float(), widths=widths, compat=True)
    widths = (times - torch.cat([times[1:], times.new_zeros(1)])) / 1000
    return Schedule(times=times.float(), widths=widths)


def euler(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """Integrate dx/dt = v with Euler's method: x <- x + v dt (Liu et al. 2023, rectified flow)."""
    x = noise
    for i, (t, dt) in enumerate(zip(schedule.times, schedule.widths, strict=True)):
        x = x + denoise(x, t) * float(dt)
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def ddpm_alphas() -> Tensor:
    """Return the cumulative products of alpha of the scaled-linear schedule, betas from 0.0015 to 0.0195."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, TRAIN_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)


def ddpm_schedule(steps: int, latent_size: Sequence[int] = (), *, base_voxels: int = 0, compat: bool = False) -> Schedule:
    """Return `steps` times of DDPM, round(linspace(999, 0, steps)).

    With fewer than 1000 steps the sampler goes from each time to the next listed one; with `compat` it goes to t - 1 as the
    reference does, which is only right for 1000.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise UsageError(f"steps is {steps}", hint=f"DDPM takes 1 to {TRAIN_STEPS}")
    times = torch.linspace(TRAIN_STEPS - 1, 0, steps, dtype=torch.float64).round().to(torch.int64)
    return Schedule(times=times, widths=torch.empty(0), compat=compat)


def ddpm(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """Sample the reverse chain with fixed small variance (Ho et al. 2020, eq. 6 and 7; epsilon prediction).

    `generator` is a CPU generator for the noise of each step, or a function of a tensor that returns noise like it.
    """
    alphas = ddpm_alphas().to(noise.device)
    one = torch.ones((), device=noise.device)
    x = noise
    for i, t in enumerate(schedule.times.tolist()):
        following = int(schedule.times[i + 1]) if i + 1 < len(schedule) else -1
        before = t - 1 if schedule.compat else following
        a_t, a_before = alphas[t], alphas[before] if before >= 0 else one
        alpha = a_t / a_before
        epsilon = denoise(x, torch.tensor(float(t)))
        data = (x - (1 - a_t) ** 0.5 * epsilon) / a_t**0.5
        mean = a_before**0.5 * (1 - alpha) / (1 - a_t) * data + alpha**0.5 * (1 - a_before) / (1 - a_t) * x
        if t > 0 and before >= 0:
            variance = ((1 - a_before) / (1 - a_t) * (1 - alpha)).clamp(min=1e-20)
            mean = mean + variance**0.5 * _draw(mean, generator)
        x = mean
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def _draw(like: Tensor, generator: Noise | None) -> Tensor:
    if callable(generator):
        return generator(like)
    return torch.randn(like.shape, generator=generator).to(like.device)


# what a sampler is called with: the family of its schedule
FAMILIES: dict[str, Callable[..., Schedule]] = {"flow": flow_schedule, "ddpm": ddpm_schedule}


def family_of(sampler: Sampler) -> str:
    """Return `flow` or `ddpm`: the attribute `family` of a sampler, `flow` when it has none."""
    return str(getattr(sampler, "family", "flow"))


def require_family(model: str, own: tuple[str, Sampler], asked: tuple[str, Sampler]) -> None:
    """Refuse a sampler of another family than that of the model's own: its networks would make noise.

    Samplers come with their names. Raises `UsageError`.
    """
    if family_of(asked[1]) != family_of(own[1]):
        raise UsageError(f"model {model} was trained for the scheduler {own[0]}, of another family than {asked[0]}",
                         hint=f"use --scheduler {own[0]}, or leave it out")  # fmt: skip


ddpm.family = "ddpm"  # type: ignore[attr-defined]
euler.family = "flow"  # type: ignore[attr-defined]
