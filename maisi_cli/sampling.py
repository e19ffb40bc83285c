"""From noise to a latent: schedules and samplers as plain functions.

A sampler is a function `sampler(denoise, noise, schedule, *, on_step=None, generator=None) -> latent`. `denoise(x, t)`
returns the network's prediction for a latent (B, 4, x, y, z) at a time t in [0, 1000]; for rectified flow that is the
velocity data - noise, for DDPM it is the noise. A flow is never asked at t = 0. A sampler may have the attributes `family`
(`flow`, `ddpm`) and `evaluations`, a function from its steps to how often it asks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .catalog import ModelSpec
from .errors import UsageError
from .plugins import plugins

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


def adams_bashforth_2(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """Extrapolate the velocity from the last two: x <- x + h ((1 + r/2) v - (r/2) v_before), r = h / h_before.

    Adams-Bashforth of order two for steps of any width (Hairer, Norsett and Wanner 1993, III.5); the first step is Euler's.
    One evaluation of the network per step.
    """
    x, before, width_before = noise, None, 0.0
    for i, (t, width) in enumerate(zip(schedule.times, schedule.widths.tolist(), strict=True)):
        velocity = denoise(x, t)
        half = width / width_before / 2 if before is not None else 0.0
        slope = velocity if before is None else (1 + half) * velocity - half * before
        x = x + width * slope
        before, width_before = velocity, width
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def heun(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """Average the velocities at both ends of each step, the far end predicted by Euler's method.

    The last step is Euler's, so that the network is never asked at t = 0 (Karras et al. 2022, algorithm 1). Two evaluations
    of the network per step, one in the last.
    """
    x = noise
    for i, (t, width) in enumerate(zip(schedule.times, schedule.widths.tolist(), strict=True)):
        velocity = denoise(x, t)
        ahead = x + width * velocity
        if i + 1 < len(schedule):
            ahead = x + width / 2 * (velocity + denoise(ahead, schedule.times[i + 1]))
        x = ahead
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def dpm_solver_2m(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for a flow: extrapolate the predicted data from the last two (Lu et al. 2022, algorithm 2).

    The data that a velocity predicts are x + u v, with alpha = 1 - u and sigma = u. The first two steps (log(alpha / sigma) is
    infinite where the path begins) and the last are of first order. One evaluation of the network per step.
    """
    x = before = noise
    levels, h_before = _noise_levels(schedule), math.inf
    for i, (t, (u, ahead)) in enumerate(zip(schedule.times, itertools.pairwise(levels), strict=True)):
        data = x + u * denoise(x, t)
        h = _log_ratio(ahead) - _log_ratio(u)
        r = h_before / h if math.isfinite(h) else math.inf
        kept, gain = _first_order(u, ahead)
        x = kept * x + gain * (data + (data - before) / (2 * r))
        before, h_before = data, h
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def unipc_2(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """UniPC of order two for a flow: predict a step, correct it with the data predicted at its end (Zhao et al. 2023, algorithm 5).

    Data prediction with B(h) = e^h - 1, for which the predictor is `dpm_solver_2m`. The corrector (UniC-2) integrates the
    parabola through the data predicted before, at, and after a step; that of the first step is UniC-1, and the last step has
    none. One evaluation of the network per step: what is predicted for the end of a step also serves the next.
    """
    x, h_before = noise, math.inf
    levels = _noise_levels(schedule)
    data = before = x + levels[0] * denoise(x, schedule.times[0])
    for i, (u, ahead) in enumerate(itertools.pairwise(levels)):
        h = _log_ratio(ahead) - _log_ratio(u)
        kept, gain = _first_order(u, ahead)
        back = h_before / h if math.isfinite(h) else math.inf  # where the data before lie, in widths of this step
        slope = (data - before) / back
        reached = kept * x + gain * (data + slope / 2)
        if i + 1 < len(schedule):
            following = reached + ahead * denoise(reached, schedule.times[i + 1])
            first, second = _moments(h)
            bend = (following - data - slope) / (1 + back)
            reached = kept * x + gain * (data + first * (following - data) + (second - first) * bend)
            data, before, h_before = following, data, h
        x = reached
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def _noise_levels(schedule: Schedule) -> list[float]:
    """Return the share of noise u at each time and, last, at the end: x = (1 - u) data + u noise."""
    return [*(float(t) / 1000 for t in schedule.times), 0.0]


def _log_ratio(u: float) -> float:
    """Return log((1 - u) / u), half of the logarithm of the signal-to-noise ratio."""
    return math.inf if u <= 0 else -math.inf if u >= 1 else math.log((1 - u) / u)


def _first_order(u: float, ahead: float) -> tuple[float, float]:
    """Return what x and the predicted data are multiplied with in a step of first order."""
    kept = ahead / u
    return kept, (1 - ahead) - (1 - u) * kept


def _moments(h: float) -> tuple[float, float]:
    """Return the mean of p and of p^2 over a step, p from 0 to 1, weighted with e^(h p) as the exact solution weights the data.

    A step of infinite width has the 1/2 of UniC-1; its second moment has no part in it.
    """
    if math.isinf(h):
        return 0.5, 0.5
    first = -1 / math.expm1(-h) - 1 / h
    return first, -1 / math.expm1(-h) - 2 / h * first


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


def ddim(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:  # fmt: skip
    """Go from each time to the next without drawing noise: DDIM with eta = 0 (Song et al. 2021, eq. 12; epsilon prediction)."""
    alphas = ddpm_alphas().to(noise.device)
    x = noise
    for i, t in enumerate(schedule.times.tolist()):
        now = alphas[t]
        ahead = alphas[int(schedule.times[i + 1])] if i + 1 < len(schedule) else torch.ones((), device=noise.device)
        epsilon = denoise(x, torch.tensor(float(t)))
        data = (x - (1 - now) ** 0.5 * epsilon) / now**0.5
        x = ahead**0.5 * data + (1 - ahead) ** 0.5 * epsilon
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


def evaluations_of(sampler: Sampler, steps: int) -> int:
    """Return how often a sampler asks the network in `steps` steps: what its attribute `evaluations` says, else once a step."""
    count: Callable[[int], int] = getattr(sampler, "evaluations", int)
    return count(steps)


def require_family(spec: ModelSpec, scheduler: str, *, compat: bool = False) -> None:
    """Refuse a sampler of another family than the one that a model was trained for, which would make noise.

    With `compat` also those that the reference does not have. Raises `UsageError` that names the model's own.
    """
    samplers, own = plugins().registry("samplers"), str(spec.scheduler.get("name", "rflow"))
    if family_of(samplers.get(scheduler)) != family_of(samplers.get(own)):
        raise UsageError(f"model {spec.name} was trained for the scheduler {own}, of another family than {scheduler}",
                         hint=f"use --scheduler {own}, or leave it out")  # fmt: skip
    if compat and scheduler not in ("rflow", "ddpm"):
        raise UsageError(f"the reference has no scheduler {scheduler}", hint=f"use --scheduler {own}, or leave out --compat")


ddpm.family = ddim.family = "ddpm"  # type: ignore[attr-defined]
euler.family = "flow"  # type: ignore[attr-defined]
heun.evaluations = lambda steps: 2 * steps - 1  # type: ignore[attr-defined]
