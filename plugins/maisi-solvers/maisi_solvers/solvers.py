"""Solvers of dx/dt = v(x, t) along a schedule of falling times, with the widths of its steps."""

from __future__ import annotations

from maisi_cli.sampling import Denoise, Noise, OnStep, Schedule
from torch import Tensor


def adams_bashforth_2(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:
    """Extrapolate the velocity from the last two: x <- x + h ((1 + r/2) v - (r/2) v_before), r = h / h_before.

    Adams-Bashforth of order two for steps of any width (Hairer, Norsett and Wanner 1993, III.5); the first step is
    Euler's. One evaluation of the network per step.
    """
    x, before, width_before = noise, None, 0.0
    for i, (t, width) in enumerate(zip(schedule.times, schedule.widths.tolist(), strict=True)):
        velocity = denoise(x, t)
        if before is None:
            x = x + width * velocity
        else:
            half = width / width_before / 2
            x = x + width * ((1 + half) * velocity - half * before)
        before, width_before = velocity, width
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def heun(denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None) -> Tensor:
    """Average the velocities at both ends of each step, the far end predicted by Euler's method.

    Heun's method; the last step is Euler's, so that the network is never asked at t = 0 (Karras et al. 2022,
    algorithm 1). Two evaluations of the network per step.
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
