"""Schedules and samplers against the reference's tables and steps, and the corrected paths against closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli.catalog import model
from maisi_cli.errors import UsageError
from maisi_cli.sampling import (
    FAMILIES,
    Sampler,
    Schedule,
    adams_bashforth_2,
    ddim,
    ddpm,
    ddpm_alphas,
    ddpm_schedule,
    dpm_solver_2m,
    euler,
    evaluations_of,
    family_of,
    flow_schedule,
    heun,
    initial_noise,
    require_family,
    unipc_2,
)
from maisi_cli.train import TrainSettings
from maisi_cli.train.diffusion import draw_times, mix
from torch import Tensor

from .golden import Golden, Shared, case, close

STEPS = (3, 5, 10, 30, 50)
SIZES = ((16, 16, 16), (32, 32, 16), (64, 64, 32), (64, 64, 64), (128, 128, 128))
SHAPE = (1, 4, 16, 16, 16)
sides = st.integers(4, 192)


@pytest.fixture
def u00(shared: Shared) -> Golden:
    return case(shared, "u00_schedulers")


# --- the reference's numbers ------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", STEPS)
def test_compat_times_and_widths_of_a_flow_are_the_reference_s_bit_for_bit(u00: Golden, steps: int, size: tuple[int, ...]) -> None:
    name = f"rflow_n{steps}_{'x'.join(map(str, size))}"
    made = flow_schedule(steps, size, compat=True)
    assert np.array_equal(made.times.numpy(), u00.arrays[f"{name}_timesteps_f16"].astype(np.float32))
    assert np.array_equal(made.widths.numpy(), u00.arrays[f"{name}_dt"])
    assert float(made.widths.sum()) == pytest.approx(u00.meta["scalars"]["rflow_table"][name]["sum_dt"], abs=1e-12)
    corrected = flow_schedule(steps, size)  # the fault is the rounding alone: half a unit of float16, and one of the integers
    assert float((corrected.times - made.times).abs().max()) <= 0.25
    assert float((corrected.widths - made.widths).abs().max()) < 0.0015


def test_one_euler_step_is_the_reference_s(u00: Golden) -> None:
    """From t = 264.5 to 187.75, whose fraction the reference drops; and the data that it expects at the end of the path."""
    step = u00.meta["scalars"]["rflow_step"]
    velocity = u00.tensor("model_output")
    for width, wanted in ((step["dt_used"], "rflow_step_prev"), (step["t"] / 1000, "rflow_step_x0")):
        schedule = Schedule(times=torch.tensor([step["t"]]), widths=torch.tensor([width], dtype=torch.float64), compat=True)
        assert close(euler(lambda _x, _t: velocity, u00.tensor("x"), schedule), u00.tensor(wanted))


def test_noise_is_added_as_the_reference_does(u00: Golden) -> None:
    data, noise = u00.tensor("x"), u00.tensor("noise")
    assert close(mix(data, noise, u00.tensor("t_rflow")), u00.tensor("rflow_add_noise"))
    alpha = ddpm_alphas()[u00.tensor("t_ddpm")].reshape(-1, 1, 1, 1, 1)
    assert close(alpha**0.5 * data + (1 - alpha) ** 0.5 * noise, u00.tensor("ddpm_add_noise"))


@pytest.mark.parametrize("size", [(64, 64, 32), (6, 5, 4)])
def test_times_in_training_are_shifted_as_the_reference_does(u00: Golden, monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]) -> None:
    u = u00.tensor("rflow_sample_timesteps_u")
    monkeypatch.setattr(torch, "rand", lambda _count: u)
    made = draw_times(TrainSettings(kind="dm", timesteps="uniform"), [math.prod(size)] * len(u))
    assert close(made, u00.tensor(f"rflow_sample_timesteps_{'x'.join(map(str, size))}"))


def test_ddpm_tables_are_the_reference_s(u00: Golden) -> None:
    alphas, wanted = ddpm_alphas(), u00.tensor("ddpm_alphas_cumprod")
    assert torch.allclose(alphas, wanted, rtol=1e-5, atol=0)
    before = torch.cat([torch.ones(1), alphas[:-1]])
    assert torch.allclose(1 - alphas / before, u00.tensor("ddpm_betas"), atol=1e-6)
    for steps in (5, 20, 1000):
        assert ddpm_schedule(steps).times.tolist() == u00.arrays[f"ddpm_timesteps_{steps}"].tolist()


@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_one_ddpm_step_is_the_reference_s(u00: Golden, t: int) -> None:
    epsilon, times = u00.tensor("model_output"), torch.tensor([t])

    def step(*, compat: bool) -> Tensor:
        schedule = Schedule(times=times, widths=torch.empty(0), compat=compat)
        return ddpm(lambda _x, _t: epsilon, u00.tensor("x"), schedule, generator=lambda _like: u00.tensor(f"ddpm_step_{t}_noise"))

    assert close(step(compat=True), u00.tensor(f"ddpm_step_{t}_prev"))
    assert close(step(compat=False), u00.tensor(f"ddpm_step_{t}_x0"))  # the last listed time goes to the data


# --- rectified flow -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 200), size=st.tuples(sides, sides, sides), base=st.sampled_from([16**3, 32**3]))
def test_times_of_a_flow_fall_from_1000_and_widths_add_up_to_one(steps: int, size: tuple[int, int, int], base: int) -> None:
    made = flow_schedule(steps, size, base_voxels=base)
    times = made.times.tolist()
    assert len(made) == len(made.widths) == steps
    assert times[0] == 1000
    assert all(a > b > 0 for a, b in itertools.pairwise(times))
    assert float(made.widths.sum()) == pytest.approx(1, abs=1e-9)
    ratio = (math.prod(size) / base) ** (1 / 3)
    for i, t in enumerate(times):  # the shift multiplies the odds of u = 1 - i / steps
        u = 1 - i / steps
        assert t == pytest.approx(1000 * ratio * u / (1 + (ratio - 1) * u), rel=1e-5)


def test_a_latent_of_the_base_size_has_even_steps() -> None:
    assert flow_schedule(4, (32, 32, 32)).times.tolist() == pytest.approx([1000, 750, 500, 250])
    assert flow_schedule(4, (32, 32, 32)).widths.tolist() == pytest.approx([0.25] * 4)


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 60), size=st.tuples(sides, sides, sides))
def test_euler_is_exact_for_a_constant_velocity(steps: int, size: tuple[int, int, int]) -> None:
    """A straight path from noise to data ends at the data, however it is cut; with the reference's widths it overshoots."""
    data, noise = initial_noise((1, 4, 3, 3, 3), 1), initial_noise((1, 4, 3, 3, 3), 2)
    made = euler(lambda _x, _t: data - noise, noise, flow_schedule(steps, size))
    assert torch.allclose(made, data, atol=2e-5)


def test_the_reference_s_widths_overshoot() -> None:
    data, noise = initial_noise(SHAPE, 1), initial_noise(SHAPE, 2)
    made = euler(lambda _x, _t: data - noise, noise, flow_schedule(30, (64, 64, 32), compat=True))
    assert torch.allclose(made - data, 0.00984375 * (data - noise), atol=2e-5)


def test_euler_integrates_an_exponential_to_first_order() -> None:
    """dx/ds = x over a path of length 1 gives (1 + 1/n)^n; the error falls as 1/n."""
    start = torch.ones(1, 1, 1, 1, 1)
    errors = []
    for steps in (10, 100):
        made = float(euler(lambda x, _t: x, start, flow_schedule(steps, (32, 32, 32))))
        assert made == pytest.approx((1 + 1 / steps) ** steps, rel=1e-4)
        errors.append(math.e - made)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


# --- DDPM -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 1000))
def test_times_of_ddpm_fall_strictly_from_999_to_0(steps: int) -> None:
    times = ddpm_schedule(steps).times.tolist()
    assert len(times) == steps
    assert (times[0], times[-1]) == (999, 0)
    assert all(a > b for a, b in itertools.pairwise(times))


def spread(steps: int, *, compat: bool) -> Iterator[tuple[float, Tensor]]:
    """Sample with the epsilon of a known image; yield, after each step, the deviation from where the next call expects to be."""
    alphas, data = ddpm_alphas(), initial_noise(SHAPE, 1)
    schedule = ddpm_schedule(steps, compat=compat)
    made: list[Tensor] = []

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        a = alphas[int(t)]
        return (x - a**0.5 * data) / (1 - a) ** 0.5

    ddpm(epsilon, initial_noise(SHAPE, 2), schedule, on_step=lambda _i, _n, x: made.append(x), generator=torch.Generator().manual_seed(3))
    for x, t in zip(made, [*schedule.times.tolist()[1:], -1], strict=True):
        a = alphas[t] if t >= 0 else torch.ones(())
        yield float((1 - a) ** 0.5), x - a**0.5 * data


@pytest.mark.parametrize("steps", [2, 4, 50])
def test_ddpm_with_a_perfect_epsilon_stays_on_the_noising_process_and_recovers_the_data(steps: int) -> None:
    """After each step x is sqrt(a) data + sqrt(1 - a) noise at the time that comes next, and the data at the end."""
    for sigma, error in spread(steps, compat=False):
        if sigma:
            assert float(error.std()) == pytest.approx(sigma, rel=0.05)
            assert abs(float(error.mean())) < 0.05 * sigma
    assert float(error.abs().max()) < 1e-4


def test_few_steps_of_the_reference_s_ddpm_leave_the_noising_process() -> None:
    noisier = [float(error.std()) / sigma for sigma, error in spread(10, compat=True) if sigma]
    assert noisier[-4:] == sorted(noisier[-4:])
    assert noisier[-4] > 1.3
    assert noisier[-1] > 30  # it was left at the noise of t = 110 where t = 0 comes next


def test_with_all_steps_both_ddpm_paths_are_one() -> None:
    made = [ddpm(lambda x, t: 0.1 * x + t / 1e4, initial_noise((1, 4, 2, 2, 2), 1), ddpm_schedule(1000, compat=compat),
                 generator=torch.Generator().manual_seed(5)) for compat in (False, True)]  # fmt: skip
    assert torch.equal(*made)


def test_ddpm_takes_a_generator_or_a_function_of_a_tensor() -> None:
    noise, drawn = initial_noise((1, 4, 3, 4, 5), 1), torch.Generator().manual_seed(7)
    calls: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        calls.append(like)
        return torch.randn(like.shape, generator=drawn)

    by_function = ddpm(lambda x, _t: x, noise, ddpm_schedule(6), generator=draw)
    assert torch.equal(by_function, ddpm(lambda x, _t: x, noise, ddpm_schedule(6), generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(by_function, ddpm(lambda x, _t: x, noise, ddpm_schedule(6), generator=torch.Generator().manual_seed(8)))
    assert len(calls) == 5  # none for the step to the data


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [euler, ddpm])
def test_every_step_is_told_and_called_with_its_time(sampler) -> None:  # type: ignore[no-untyped-def]
    schedule = FAMILIES[family_of(sampler)](5, (16, 16, 16))
    seen: list[tuple[int, int, Tensor]] = []
    times: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return torch.zeros_like(x)

    noise = initial_noise((1, 4, 2, 2, 2), 0)
    before = noise.clone()
    generator = torch.Generator().manual_seed(0)
    made = sampler(denoise, noise, schedule, on_step=lambda done, total, x: seen.append((done, total, x)), generator=generator)
    assert [(done, total) for done, total, _ in seen] == [(i, 5) for i in range(1, 6)]
    assert torch.equal(seen[-1][2], made)
    assert times == pytest.approx(schedule.times.tolist())
    assert torch.equal(noise, before)


def test_noise_is_torch_s_own_of_the_seed() -> None:
    """The values of seed 0 that the reference's notes give, and independence of the state of the process."""
    made = initial_noise((1, 4, 64, 64, 64), 0)
    assert made.flatten()[:6].tolist() == pytest.approx([-1.1258398, -1.1523602, -0.2505786, -0.4338788, 0.8487104, 0.6920092])
    torch.manual_seed(3)
    assert torch.equal(initial_noise((1, 4, 8, 8, 8), 11), initial_noise((1, 4, 8, 8, 8), 11))
    assert not torch.equal(initial_noise((1, 4, 8, 8, 8), 11), initial_noise((1, 4, 8, 8, 8), 12))


@settings(max_examples=10, deadline=None)
@given(st.integers(-3, 0))
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps is {steps}"):
        flow_schedule(steps, (16, 16, 16))
    with pytest.raises(UsageError, match=f"steps is {steps}"):
        ddpm_schedule(steps)


def test_ddpm_has_no_more_than_its_1000_steps() -> None:
    with pytest.raises(UsageError, match="1 to 1000"):
        ddpm_schedule(1001)


# --- faster samplers --------------------------------------------------------------------------

FLOWS = [adams_bashforth_2, heun, dpm_solver_2m, unipc_2]
LATENT = (32, 32, 16)


def gaussian(deviation: float, mean: float) -> Any:
    """Return the exact velocity of a flow to N(mean, deviation^2): E[data - noise | x] at u, linear in x (closed form)."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        u = t.double() / 1000
        a, variance = 1 - u, (1 - u) ** 2 * deviation**2 + u**2
        away = x - a * mean
        return mean + (a * deviation**2 - u) / variance * away

    return field


def end(deviation: float, mean: float, noise: Tensor) -> Tensor:
    """Return where the exact flow to N(mean, deviation^2) takes noise: mean + deviation * noise."""
    return mean + deviation * noise


@pytest.mark.parametrize("sampler", FLOWS)
def test_second_order_samplers_are_of_second_order(sampler: Sampler) -> None:
    noise = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64)

    def error(steps: int) -> float:
        return float((sampler(gaussian(0.5, 1.0), noise, flow_schedule(steps, LATENT)) - end(0.5, 1.0, noise)).abs().max())

    assert math.log2(error(100) / error(200)) == pytest.approx(2, abs=0.35)
    assert error(30) < float((euler(gaussian(0.5, 1.0), noise, flow_schedule(30, LATENT)) - end(0.5, 1.0, noise)).abs().max()) / 3


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 9), size=st.tuples(*[st.integers(4, 128)] * 3))
def test_adams_bashforth_is_exact_after_its_first_step_for_a_velocity_that_is_linear_in_time(steps: int, size: tuple[int, ...]) -> None:
    """Steps of any width: only the first, Euler's, is off, by half of the slope times its width squared."""
    schedule = flow_schedule(steps, size)
    made = adams_bashforth_2(lambda _x, t: t.double() / 1000, torch.zeros((), dtype=torch.float64), schedule)
    assert float(made) == pytest.approx(0.5 + float(schedule.widths[0]) ** 2 / 2, abs=1e-6)


@pytest.mark.parametrize("sampler", FLOWS)
def test_with_one_step_every_flow_sampler_is_euler(sampler: Sampler) -> None:
    noise, schedule = torch.tensor([0.7, -1.3], dtype=torch.float64), flow_schedule(1, LATENT)
    field = gaussian(0.5, 1.0)
    assert torch.allclose(sampler(field, noise, schedule), euler(field, noise, schedule), atol=1e-9)


@pytest.mark.parametrize("sampler", FLOWS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_straight_paths_are_exact_in_any_number_of_steps(sampler: Sampler, steps: int) -> None:
    noise, data = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([3.0, -1.0], dtype=torch.float64)
    made = sampler(lambda _x, _t: data - noise, noise, flow_schedule(steps, LATENT))
    assert torch.allclose(made, data, atol=1e-6)


@pytest.mark.parametrize(("sampler", "calls"), [(adams_bashforth_2, 5), (heun, 9), (dpm_solver_2m, 5), (unipc_2, 5)])
def test_evaluations_are_counted_and_never_at_the_end(sampler: Sampler, calls: int) -> None:
    asked: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return -x

    sampler(field, torch.ones(1), flow_schedule(5, LATENT))
    assert len(asked) == calls == evaluations_of(sampler, 5)
    assert min(asked) > 0


def exact_epsilon(deviation: float) -> Any:
    """Return E[epsilon | x_t] for data from N(0, deviation^2): sqrt(1 - a) x / (a deviation^2 + 1 - a)."""
    alphas = ddpm_alphas().double()

    def field(x: Tensor, t: Tensor) -> Tensor:
        a = alphas[int(t)]
        return (1 - a).sqrt() * x / (a * deviation**2 + 1 - a)

    return field


@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0])
def test_ddim_follows_the_flow_to_the_data_and_draws_no_noise(deviation: float) -> None:
    """For Gaussian data the probability flow scales each value, to the deviation of the data at the end."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first = float(ddpm_alphas()[999])
    at_start = (first * deviation**2 + 1 - first) ** 0.5
    exact = noise / at_start * deviation

    def error(steps: int) -> float:
        made = ddim(exact_epsilon(deviation), noise, ddpm_schedule(steps), generator=_must_not_draw)
        return float((made - exact).abs().max() / exact.abs().max())

    assert error(1000) < 0.03
    assert error(1000) < error(200) < error(50) < error(10) < 1


def _must_not_draw(like: Tensor) -> Tensor:
    raise AssertionError("DDIM with eta = 0 draws nothing")


@pytest.mark.parametrize("steps", [3, 40, 1000])
def test_ddpm_of_gaussian_data_has_the_variance_of_its_chain(steps: int) -> None:
    """Each step scales x and adds noise: the variance follows a recursion of two numbers (Ho et al. 2020, eq. 7), in float64."""
    deviation, alphas, times = 0.5, ddpm_alphas().double().tolist(), ddpm_schedule(steps).times.tolist()
    noise = torch.randn(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = float(noise.var())
    for t, ahead in zip(times, [*times[1:], None], strict=True):
        a, b = alphas[t], 1.0 if ahead is None else alphas[ahead]
        data = a**0.5 * deviation**2 / (a * deviation**2 + 1 - a)  # E[data | x] / x
        scale = b**0.5 * (1 - a / b) / (1 - a) * data + (a / b) ** 0.5 * (1 - b) / (1 - a)
        wanted = scale**2 * wanted + (1 - b) / (1 - a) * (1 - a / b)
    made = ddpm(exact_epsilon(deviation), noise, ddpm_schedule(steps), generator=torch.Generator().manual_seed(1))
    assert float(made.var()) == pytest.approx(wanted, rel=0.03)
    assert steps < 1000 or wanted == pytest.approx(deviation**2, rel=0.05)  # the smaller of the two fixed variances


def test_ddim_keeps_the_noise_of_a_known_image_and_recovers_it_in_any_number_of_steps() -> None:
    data, noise, alphas = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64), ddpm_alphas()
    for steps in (1, 2, 7):
        times, seen = ddpm_schedule(steps).times.tolist(), []
        start = float(alphas[999]) ** 0.5 * data + (1 - float(alphas[999])) ** 0.5 * noise
        ddim(lambda x, t: (x - alphas[int(t)] ** 0.5 * data) / (1 - alphas[int(t)]) ** 0.5, start, ddpm_schedule(steps),
             on_step=lambda _i, _n, x, seen=seen: seen.append(x))  # fmt: skip
        for t, x in zip(times[1:], seen, strict=False):
            assert torch.allclose(x, alphas[t] ** 0.5 * data + (1 - alphas[t]) ** 0.5 * noise, atol=1e-4)
        assert torch.allclose(seen[-1], data, atol=1e-4)


def told(sampler: Sampler, data: Any, schedule: Schedule) -> list[float]:
    """Return where each step ends when the data that the network predicts depend on log(alpha / sigma) alone."""
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        u = float(t) / 1000
        return (data(math.log((1 - u) / u) if u < 1 else -3.0) - x) / u

    sampler(field, torch.zeros((), dtype=torch.float64), schedule, on_step=lambda _i, _n, x: seen.append(float(x)))
    return seen


def exact_step(data: Any, start: float, u: float, ahead: float) -> float:
    """Integrate the step: x' = (sigma'/sigma) x + sigma' times the integral of e^l data(l), l = log(alpha / sigma)."""
    low, high = math.log((1 - u) / u), math.log((1 - ahead) / ahead)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    places = (high + low) / 2 + (high - low) / 2 * nodes
    integral = float((weights * np.exp(places) * np.array([data(each) for each in places])).sum()) * (high - low) / 2
    return ahead / u * start + ahead * integral


def test_the_corrector_of_unipc_is_exact_for_data_that_are_a_parabola_in_its_time() -> None:
    def parabola(place: float) -> float:
        return 0.3 - 0.7 * place + 0.2 * place**2

    schedule = flow_schedule(7, LATENT)
    made, levels = told(unipc_2, parabola, schedule), [float(t) / 1000 for t in schedule.times]
    for i in range(2, 6):  # the first two steps begin in the infinite, the last has no corrector
        assert made[i] == pytest.approx(exact_step(parabola, made[i - 1], levels[i], levels[i + 1]), rel=1e-9)
    assert made[6] == pytest.approx(parabola(math.log((1 - levels[6]) / levels[6])))


def test_dpm_solver_takes_the_data_in_the_middle_of_a_step_from_the_line_through_the_last_two() -> None:
    def line(place: float) -> float:
        return 0.3 - 0.7 * place

    schedule = flow_schedule(7, LATENT)
    made, levels = told(dpm_solver_2m, line, schedule), [float(t) / 1000 for t in schedule.times]
    for i in range(2, 6):
        low, high = (math.log((1 - u) / u) for u in levels[i : i + 2])
        middle = line((low + high) / 2)
        assert made[i] == pytest.approx(exact_step(lambda _place, middle=middle: middle, made[i - 1], levels[i], levels[i + 1]), rel=1e-9)


def test_the_reference_has_none_of_these() -> None:
    rflow = model("rflow-ct")
    require_family(rflow, "ab2")
    require_family(rflow, "rflow", compat=True)
    with pytest.raises(UsageError, match="the reference has no scheduler ab2"):
        require_family(rflow, "ab2", compat=True)
    with pytest.raises(UsageError, match="of another family than ddim"):
        require_family(rflow, "ddim")
    require_family(model("ddpm-ct"), "ddim")
