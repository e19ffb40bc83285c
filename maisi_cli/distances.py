"""Distances between two sets of features: Frechet, kernel, precision and recall; numbers in, numbers out.

Features are rows of float arrays (n, D). Sums are float64. Nothing here knows what a feature means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Number, mean (D,) and scatter (D, D), the sum of outer products about the mean, of rows of features.

    Moments merge: those of the parts, in any split, give those of the whole to rounding (Chan, Golub, LeVeque 1983).
    """

    n: float
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Moments:
        """Return the moments of rows of features."""
        rows = np.asarray(features, dtype=np.float64)
        mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
        centred = rows - mean
        return cls(n=float(len(rows)), mean=mean, scatter=centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets together."""
        n = self.n + other.n
        if not n:
            return self
        apart = other.mean - self.mean
        return Moments(
            n=n,
            mean=self.mean + apart * (other.n / n),
            scatter=self.scatter + other.scatter + np.outer(apart, apart) * (self.n * other.n / n),
        )

    @property
    def covariance(self) -> Array:
        """The unbiased covariance. Raises `ValueError` for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two rows, not {self.n:g}")
        return self.scatter / (self.n - 1)


# --- Frechet ------------------------------------------------------------------------------------


def frechet(one: Moments, other: Moments) -> float:
    r"""Return the squared Frechet distance of two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017).

    $|m_1 - m_2|^2 + \mathrm{tr}(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})$, with symmetric eigenvalues throughout: no
    imaginary part, and covariances of lower rank than D need no regularisation. Never below 0.
    """
    return frechet_of(one.mean, one.covariance, other.mean, other.covariance)


def frechet_of(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """Return the squared Frechet distance from means (D,) and covariances (D, D)."""
    # tr((S1 S2)^1/2) is the sum of the singular values of L1' L2 for any S = L L'
    cross = linalg.svdvals(_root(covariance).T @ _root(other_covariance)).sum()
    apart = mean - other_mean
    return max(0.0, float(apart @ apart + np.trace(covariance) + np.trace(other_covariance) - 2 * cross))


def _root(covariance: Array) -> Array:
    """Return L (D, rank) with L L' = S, from the symmetric eigendecomposition; what is negative by rounding counts as 0."""
    values, vectors = linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    root: Array = vectors[:, kept] * np.sqrt(values[kept])
    return root


# --- effective number ---------------------------------------------------------------------------


def effective_number(counts: Sequence[float], means: Array, whole: Moments) -> float:
    """Return for how many independent slices those of some volumes count, between the number of volumes and of slices.

    The slices of a volume resemble one another: with intraclass correlation r (analysis of variance over all features)
    and m slices a volume, n slices count as n / (1 + (m - 1) r) (Kish 1965). `means` holds a row a volume.
    """
    sizes = np.asarray(counts, dtype=np.float64)
    n, volumes = float(sizes.sum()), len(sizes)
    if volumes < 2 or n <= volumes:
        return float(volumes)
    between = float((sizes[:, None] * (means - whole.mean) ** 2).sum())
    within = max(float(np.trace(whole.scatter)) - between, 0.0)
    ms_between, ms_within = between / (volumes - 1), within / (n - volumes)
    typical = (n - float((sizes**2).sum()) / n) / (volumes - 1)
    total = ms_between + (typical - 1) * ms_within
    r = (ms_between - ms_within) / total if total > 0 else 1.0
    return float(np.clip(n / (1 + (n / volumes - 1) * max(r, 0.0)), volumes, n))


# --- kernel distance ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel distance and its standard error, from leaving out one group of either set at a time (jackknife)."""

    value: float
    error: float


def kid(
    one: NDArray[np.floating],
    other: NDArray[np.floating],
    *,
    groups: NDArray[np.integer] | None = None,
    other_groups: NDArray[np.integer] | None = None,
) -> Kernel:
    """Return the kernel (Inception) distance: MMD^2 with the kernel (x'y / D + 1)^3 (Binkowski et al. 2018).

    Unbiased for independent groups: `groups` names the volume of each row, and pairs of rows of one volume are left out,
    as pairs of a row with itself are where no groups are given. It may be negative. Raises `ValueError` for a set with
    fewer than three groups.
    """
    a_rows, b_rows = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    first, n = _numbered(groups, len(one))
    second, m = _numbered(other_groups, len(other))
    if min(len(n), len(m)) < 3:
        raise ValueError("a kernel distance with its error needs three groups on either side")
    within, opposite = _sums(a_rows, a_rows, first, first, len(n), len(n)), _sums(b_rows, b_rows, second, second, len(m), len(m))
    across = _sums(a_rows, b_rows, first, second, len(n), len(m))

    def alone(sums: Array, sizes: Array) -> tuple[float, Array]:
        """Return the mean over pairs of different groups, and the same without each group."""
        apart, pairs = sums - np.diag(np.diag(sums)), np.outer(sizes, sizes) - np.diag(sizes**2)
        without = (apart.sum() - 2 * apart.sum(axis=1)) / (pairs.sum() - 2 * pairs.sum(axis=1))
        return float(apart.sum() / pairs.sum()), without

    (a, a_without), (b, b_without) = alone(within, n), alone(opposite, m)
    total, left = across.sum(), len(one) * len(other)
    value = a + b - 2 * float(total / left)
    left_out = (a_without + b - 2 * (total - across.sum(axis=1)) / (left - n * len(other)),
                a + b_without - 2 * (total - across.sum(axis=0)) / (left - m * len(one)))  # fmt: skip
    variance = sum((len(each) - 1) / len(each) * float(((each - each.mean()) ** 2).sum()) for each in left_out)
    return Kernel(value=value, error=float(np.sqrt(variance)))


def _numbered(groups: NDArray[np.integer] | None, rows: int) -> tuple[NDArray[np.int64], Array]:
    """Return the number of each row's group, and how many rows each group has."""
    names = np.arange(rows) if groups is None else np.asarray(groups)
    _, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
    return numbers, counts.astype(np.float64)


def _sums(a: Array, b: Array, rows: NDArray[np.int64], columns: NDArray[np.int64], n: int, m: int) -> Array:
    """Return the sum of the kernel over the pairs of each group with each other one, (n, m)."""
    kernel = (a @ b.T / a.shape[1] + 1) ** 3
    by_row = np.zeros((n, kernel.shape[1]))
    np.add.at(by_row, rows, kernel)
    found = np.zeros((m, n))
    np.add.at(found, columns, by_row.T)
    return found.T


# --- precision, recall, density, coverage -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhood:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), with `k` neighbours."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def prdc(real: NDArray[np.floating], synth: NDArray[np.floating], *, k: int = 5) -> Neighbourhood:
    """Return precision, recall, density and coverage of rows of features against real ones.

    A row lies in the manifold of a set when it is within the distance of some row of that set to its k-th neighbour. `k`
    is lowered to what both sets allow. Raises `ValueError` for a set with fewer than two rows.
    """
    from scipy.spatial.distance import cdist

    real, synth = np.asarray(real, dtype=np.float64), np.asarray(synth, dtype=np.float64)
    k = min(k, len(real) - 1, len(synth) - 1)
    if k < 1:
        raise ValueError("precision and recall need two rows on either side")
    reach = np.sort(cdist(real, real), axis=1)[:, k]  # column 0 is the row itself
    other_reach = np.sort(cdist(synth, synth), axis=1)[:, k]
    apart = cdist(real, synth)
    inside = apart <= reach[:, None]
    return Neighbourhood(
        precision=float(inside.any(axis=0).mean()),
        recall=float((apart <= other_reach[None, :]).any(axis=1).mean()),
        density=float(inside.sum(axis=0).mean() / k),
        coverage=float((apart.min(axis=1) <= reach).mean()),
        k=k,
    )


# --- resampling ---------------------------------------------------------------------------------


def bootstrap_weights(volumes: int, times: int, seed: int) -> NDArray[np.float64]:
    """Return how often each volume is drawn in each bootstrap sample, (times, volumes); every row sums to `volumes`.

    Samples with fewer than two different volumes, which have no spread, are drawn again where there are two volumes.
    """
    rng = np.random.default_rng([0x626F6F74, seed])
    rows: list[Array] = []
    while len(rows) < times:
        row = np.bincount(rng.integers(0, volumes, volumes), minlength=volumes).astype(np.float64)
        if volumes < 2 or np.count_nonzero(row) > 1:
            rows.append(row)
    return np.stack(rows) if rows else np.zeros((0, volumes))


def split_weights(volumes: int, times: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return random halves of the volumes as two arrays of 0 and 1, (times, volumes); an odd one is left out."""
    rng = np.random.default_rng([0x73706C74, seed])
    one, other = np.zeros((times, volumes)), np.zeros((times, volumes))
    for row in range(times):
        order = rng.permutation(volumes)
        one[row, order[: volumes // 2]] = 1
        other[row, order[volumes // 2 : volumes // 2 * 2]] = 1
    return one, other


def weighted(parts: Iterable[Moments], weights: NDArray[np.float64]) -> list[Moments]:
    """Return the moments of volumes counted with weights: one for each row of `weights` (times, volumes).

    The parts are read once, and only as many sums are held as there are rows.
    """
    origin: Array | None = None
    n = np.zeros(len(weights))
    total = squares = np.zeros(0)
    for column, part in enumerate(parts):
        if origin is None:
            origin = part.mean
            total = np.zeros((len(weights), len(origin)))
            squares = np.zeros((len(weights), len(origin), len(origin)))
        apart = part.mean - origin
        square = part.scatter + part.n * np.outer(apart, apart)
        for row in np.flatnonzero(weights[:, column]).tolist():
            n[row] += weights[row, column] * part.n
            total[row] += weights[row, column] * part.n * apart
            squares[row] += weights[row, column] * square
    if origin is None:
        raise ValueError("no features")
    found = []
    for row in range(len(weights)):
        mean = total[row] / n[row] if n[row] else total[row]
        found.append(Moments(n=float(n[row]), mean=origin + mean, scatter=squares[row] - n[row] * np.outer(mean, mean)))
    return found
