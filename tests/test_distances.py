"""Distances of features: closed forms, the matrix square root of scipy, and properties."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maisi_cli.distances import (
    Moments,
    bootstrap_weights,
    effective_number,
    frechet,
    frechet_of,
    kid,
    prdc,
    split_weights,
    weighted,
)
from numpy.typing import NDArray
from scipy import linalg

usual = settings(max_examples=30, deadline=None)
Array = NDArray[np.float64]


def rows(seed: int, n: int, d: int, *, shift: float = 0.0, scale: float = 1.0) -> Array:
    rng = np.random.default_rng(seed)
    return shift + scale * rng.normal(size=(n, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d)))


def rotation(seed: int, d: int) -> Array:
    return np.asarray(linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0])


# --- Frechet --------------------------------------------------------------------------------


def test_the_distance_of_two_gaussians_with_diagonal_covariances_is_the_closed_form() -> None:
    one, other = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    found = frechet_of(np.zeros(3), np.diag(one), np.array([1.0, 2.0, 0.0]), np.diag(other))
    assert found == pytest.approx(5 + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum(), abs=1e-6)


def test_the_distance_of_covariances_that_commute_is_the_closed_form_in_any_basis() -> None:
    turn = rotation(1, 8)
    one, other = np.linspace(0.1, 3, 8), np.linspace(2, 0.01, 8)
    found = frechet_of(np.ones(8), turn @ np.diag(one) @ turn.T, np.zeros(8), turn @ np.diag(other) @ turn.T)
    assert found == pytest.approx(8 + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum(), abs=1e-6)


def test_the_distance_in_two_dimensions_is_the_closed_form_of_the_square_root() -> None:
    one, other = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    # eigenvalues l1, l2 of a 2x2 product: (sqrt l1 + sqrt l2)^2 = trace + 2 sqrt det
    product = one @ other
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert frechet_of(np.zeros(2), one, np.zeros(2), other) == pytest.approx(6 + 1 - 2 * cross, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(400, 12), (60, 40)])
def test_the_distance_equals_that_with_the_square_root_of_scipy(n: int, d: int) -> None:
    a, b = rows(1, n, d), rows(2, n, d, shift=0.3, scale=1.4)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(one @ other)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * np.trace(root).real
    assert frechet(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-4)


def test_more_features_than_rows_need_no_regularisation() -> None:
    a, b = rows(1, 10, 64), rows(2, 10, 64)
    assert frechet(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-9 * np.trace(np.cov(a, rowvar=False)))
    # both spaces have nine dimensions; apart they would give the sum of the traces, and never less than the means do
    found = frechet(Moments.of(a), Moments.of(b))
    assert (
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        < found
        < ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    )


@usual
@given(seed=st.integers(0, 10**6), d=st.integers(1, 12))
def test_the_distance_is_symmetric_zero_on_itself_and_blind_to_rotation(seed: int, d: int) -> None:
    a, b = rows(seed, 30, d), rows(seed + 1, 40, d, shift=0.5)
    one, other = Moments.of(a), Moments.of(b)
    found = frechet(one, other)
    assert found == pytest.approx(frechet(other, one), rel=1e-9, abs=1e-9)
    assert frechet(one, one) == pytest.approx(0, abs=1e-8 * np.trace(one.covariance))
    turn = rotation(seed, d)
    assert frechet(Moments.of(a @ turn + 5), Moments.of(b @ turn + 5)) == pytest.approx(found, rel=1e-7, abs=1e-8)
    assert frechet(Moments.of(3 * a), Moments.of(3 * b)) == pytest.approx(9 * found, rel=1e-7, abs=1e-8)


# --- moments --------------------------------------------------------------------------------


@usual
@given(cuts=st.lists(st.integers(0, 50), max_size=6), shift=st.sampled_from([0.0, 1e4]))
def test_moments_of_any_split_merge_to_those_of_the_whole(cuts: list[int], shift: float) -> None:
    whole = rows(3, 50, 5, shift=shift)
    found = reduce(Moments.merged, [Moments.of(part) for part in np.split(whole, sorted(cuts))])
    assert found.n == 50
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(whole, rowvar=False), rtol=1e-7, atol=1e-9)


@usual
@given(weights=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
def test_weighted_moments_are_those_of_volumes_repeated(weights: list[int]) -> None:
    volumes = [rows(k, 6 + k, 3, shift=100.0 + k) for k in range(4)]
    (found,) = weighted([Moments.of(each) for each in volumes], np.array([weights], dtype=float))
    repeated = np.concatenate([each for each, times in zip(volumes, weights, strict=True) for _ in range(times)])
    assert found.n == len(repeated)
    np.testing.assert_allclose(found.mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.scatter, Moments.of(repeated).scatter, rtol=1e-8, atol=1e-8)


def test_a_covariance_needs_two_rows_and_a_whole_needs_parts() -> None:
    with pytest.raises(ValueError, match="two rows"):
        _ = Moments.of(np.ones((1, 3))).covariance
    with pytest.raises(ValueError, match="no features"):
        weighted([], np.zeros((1, 0)))


# --- effective number -----------------------------------------------------------------------


def effective(volumes: list[Array]) -> float:
    parts = [Moments.of(each) for each in volumes]
    return effective_number([part.n for part in parts], np.stack([part.mean for part in parts]), reduce(Moments.merged, parts))


def test_slices_that_are_all_alike_count_once_a_volume_and_independent_ones_in_full() -> None:
    rng = np.random.default_rng(0)
    alike = [np.repeat(rng.normal(size=(1, 16)), 20, axis=0) for _ in range(12)]
    assert effective(alike) == pytest.approx(12)
    independent = [rng.normal(size=(20, 16)) for _ in range(40)]
    assert effective(independent) == pytest.approx(800, rel=0.1)


def test_the_effective_number_is_that_of_the_intraclass_correlation() -> None:
    rng = np.random.default_rng(1)
    r, m = 0.4, 25
    volumes = [np.sqrt(r) * rng.normal(size=(1, 64)) + np.sqrt(1 - r) * rng.normal(size=(m, 64)) for _ in range(200)]
    assert effective(volumes) == pytest.approx(200 * m / (1 + (m - 1) * r), rel=0.05)


# --- kernel distance ------------------------------------------------------------------------


def naive_kid(a: Array, b: Array, first: Array, second: Array) -> float:
    def k(x: Array, y: Array) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(x: Array, names: Array) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if names[i] != names[j]]
        return sum(k(x[i], x[j]) for i, j in pairs) / len(pairs)

    return within(a, first) + within(b, second) - 2 * float(np.mean([k(x, y) for x in a for y in b]))


def test_the_kernel_distance_is_the_sum_over_pairs_of_different_volumes() -> None:
    a, b = rows(1, 7, 3), rows(2, 8, 3, shift=1)
    assert kid(a, b).value == pytest.approx(naive_kid(a, b, np.arange(7), np.arange(8)))
    first, second = np.array([5, 5, 1, 1, 1, 2, 9]), np.array([3, 3, 3, 0, 0, 1, 1, 1])
    found = kid(a, b, groups=first, other_groups=second)
    assert found.value == pytest.approx(naive_kid(a, b, first, second))
    left = [naive_kid(a[first != k], b, first[first != k], second) for k in np.unique(first)]
    right = [naive_kid(a, b[second != k], first, second[second != k]) for k in np.unique(second)]
    variance = sum((len(x) - 1) / len(x) * ((np.array(x) - np.mean(x)) ** 2).sum() for x in (left, right))
    assert found.error == pytest.approx(np.sqrt(variance))


def test_pairs_of_one_volume_are_left_out_so_that_equal_distributions_are_no_distance_apart() -> None:
    """Slices of a volume resemble one another; their pairs would make equal distributions look apart."""
    rng = np.random.default_rng(5)
    names = np.repeat(np.arange(30), 8)
    values, errors, naive = [], [], []
    for _ in range(30):
        a, b = (np.repeat(rng.normal(size=(30, 6)), 8, axis=0) + 0.1 * rng.normal(size=(240, 6)) for _ in range(2))
        found = kid(a, b, groups=names, other_groups=names)
        values.append(found.value)
        errors.append(found.error)
        naive.append(kid(a, b).value)
    sure = np.std(values) / np.sqrt(30)
    assert abs(np.mean(values)) < 3 * sure < np.mean(naive)
    assert 0.5 < np.mean(errors) / np.std(values) < 2
    assert kid(a, a + 1, groups=names, other_groups=names).value > 4 * np.mean(errors)
    with pytest.raises(ValueError, match="three groups"):
        kid(a, b, groups=np.arange(240) // 120)


# --- precision, recall, density, coverage ---------------------------------------------------


def test_precision_and_recall_of_a_narrow_and_of_a_foreign_set() -> None:
    real = rows(1, 400, 2)
    same = prdc(real, real.copy(), k=3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    narrow = prdc(real, real.mean(0) + 0.05 * (real[:200] - real.mean(0)), k=3)
    assert narrow.precision > 0.8 > 0.2 > narrow.recall
    far = prdc(real, real + 100, k=3)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_the_four_numbers_of_four_points_on_a_line() -> None:
    real, synth = np.array([[0.0], [1.0], [3.0], [6.0]]), np.array([[0.5], [2.5], [20.0], [21.0]])
    # k = 1: real reach 1, 1, 2, 3; synth reach 2, 2, 1, 1
    found = prdc(real, synth, k=1)
    assert found.precision == 0.5  # 0.5 and 2.5
    assert found.density == pytest.approx((2 + 1) / 4)  # 0.5 lies in the balls of 0 and 1, 2.5 in that of 3
    assert found.recall == 0.75  # 6 lies in no ball
    assert found.coverage == 0.75  # the nearest to 6 is 2.5, 3.5 away
    assert prdc(real, synth).k == 3


# --- resampling -----------------------------------------------------------------------------


@usual
@given(volumes=st.integers(2, 20), seed=st.integers(0, 100))
def test_resamples_keep_their_size_and_halves_do_not_overlap(volumes: int, seed: int) -> None:
    draws = bootstrap_weights(volumes, 5, seed)
    assert (draws.sum(axis=1) == volumes).all()
    assert ((draws > 0).sum(axis=1) > 1).all()
    one, other = split_weights(volumes, 5, seed)
    assert (one * other == 0).all()
    assert (one.sum(axis=1) == volumes // 2).all()
    assert (other.sum(axis=1) == volumes // 2).all()
    np.testing.assert_array_equal(draws, bootstrap_weights(volumes, 5, seed))
