"""Solvers of dx/dt = v(x, t) along a schedule of falling times, with the widths of its steps."""

from __future__ import annotations

from maisi_cli.sampling import Denoise, Noise, OnStep, Schedule
from torch import Tensor


def adams_bashforth_3(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:
    """Integrate the parabola through the last three velocities over each step, whatever the widths of steps.

    Adams-Bashforth of order three (Hairer, Norsett and Wanner 1993, III.5); the first step is the midpoint rule's, the second
    of order two. One evaluation of the network per step, two in the first.
    """
    x = noise
    known: list[tuple[float, Tensor]] = []  # where on the path the last velocities were, measured from its start
    here = 0.0
    for i, (t, width) in enumerate(zip(schedule.times, schedule.widths.tolist(), strict=True)):
        known = [*known[-2:], (here, denoise(x, t))]
        slopes = known if i else [(here, denoise(x + width / 2 * known[0][1], t - 500 * width))]
        for place, velocity in slopes:
            others = [other - here for other, _ in slopes if other != place]
            x = x + _integral(place - here, others, width) * velocity
        here += width
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


def _integral(place: float, others: list[float], width: float) -> float:
    """Return the integral over [0, width] of the Lagrange polynomial that is 1 at `place` and 0 at the others (at most two)."""
    scale = 1.0
    for other in others:
        scale *= place - other
    a, b = (*others, None, None)[:2]
    if a is None:
        return width
    if b is None:
        return (width**2 / 2 - a * width) / scale
    return (width**3 / 3 - (a + b) * width**2 / 2 + a * b * width) / scale


def midpoint(
    denoise: Denoise, noise: Tensor, schedule: Schedule, *, on_step: OnStep | None = None, generator: Noise | None = None
) -> Tensor:
    """Take each step with the velocity in its middle, which Euler's method predicts: the midpoint rule, of order two.

    Two evaluations of the network per step.
    """
    x = noise
    for i, (t, width) in enumerate(zip(schedule.times, schedule.widths.tolist(), strict=True)):
        middle = x + width / 2 * denoise(x, t)
        x = x + width * denoise(middle, t - 500 * width)
        if on_step:
            on_step(i + 1, len(schedule), x)
    return x


# how often the network is asked in so many steps, as `maisi_cli.sampling.evaluations_of` reads it
adams_bashforth_3.evaluations = lambda steps: steps + 1  # type: ignore[attr-defined]
midpoint.evaluations = lambda steps: 2 * steps  # type: ignore[attr-defined]
