"""The solvers have the order that they claim, and are found by `maisi` once the package is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest
import torch
from maisi_cli.plugins import load
from maisi_cli.sampling import Sampler, Schedule, evaluations_of, flow_schedule
from maisi_solvers.solvers import adams_bashforth_3, midpoint
from torch import Tensor

LATENT = (32, 32, 16)


def uneven(steps: int) -> Schedule:
    """A schedule whose steps differ in width, as for a large latent."""
    return flow_schedule(steps, LATENT)


def error(solver: Sampler, steps: int) -> float:
    """The error for dx/ds = -x cos(4 s), s = 1 - t/1000, whose solution is x(0) exp(-sin(4 s)/4)."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return -x * torch.cos(4 * (1 - t.double() / 1000))

    start = torch.ones(1, dtype=torch.float64)
    return abs(float(solver(field, start, uneven(steps))) - math.exp(-math.sin(4.0) / 4))


@pytest.mark.parametrize(("solver", "order"), [(adams_bashforth_3, 3), (midpoint, 2)])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(solver: Sampler, order: int) -> None:
    rate = math.log2(error(solver, 200) / error(solver, 400))
    assert order - 0.2 < rate < order + 0.3


@pytest.mark.parametrize("solver", [adams_bashforth_3, midpoint])
def test_straight_paths_are_exact_in_any_number_of_steps(solver: Sampler) -> None:
    noise, data = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, -1.0], dtype=torch.float64)
    for steps in (1, 2, 7):
        made = solver(lambda x, t: data - noise, noise, uneven(steps))
        assert torch.allclose(made, data, atol=1e-6)


@pytest.mark.parametrize(("solver", "calls"), [(adams_bashforth_3, 6), (midpoint, 10)])
def test_evaluations_and_steps_are_counted(solver: Sampler, calls: int) -> None:
    asked: list[float] = []
    seen: list[tuple[int, int]] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return x

    solver(field, torch.ones(1), uneven(5), on_step=lambda done, total, x: seen.append((done, total)))
    assert len(asked) == calls == evaluations_of(solver, 5)
    assert min(asked) > 0
    assert seen == [(k, 5) for k in range(1, 6)]


@pytest.fixture
def installed() -> None:
    """Skip where the package is only a folder; `pip install ./plugins/maisi-solvers` installs it."""
    if not any(entry.name == "solvers" for entry in entry_points(group="maisi")):
        pytest.skip("maisi-solvers is not installed")


def test_maisi_lists_and_finds_them(installed: None) -> None:
    found = load("solvers")
    assert [info.problem for info in found.infos if info.name == "solvers"] == [None]
    solver: Callable[..., Tensor] = found.registry("samplers").get("ab3")
    assert solver is adams_bashforth_3
    assert found.registry("samplers").get("midpoint") is midpoint
    assert found.registry("samplers").entry("ab3").owner == "maisi-solvers"


def test_without_the_plugin_the_names_are_gone() -> None:
    assert "ab3" not in load("").registry("samplers")
