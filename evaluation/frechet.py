"""The Fréchet distance of two sets of features, exact to round-off also for few samples.

Of two Gaussians (Dowson and Landau 1982; of image features: Heusel et al. 2017, arXiv 1706.08500) it is

    |m1 - m2|^2 + Tr S1 + Tr S2 - 2 T,     T = Tr (S1 S2)^(1/2) = || F1^T F2 ||_* if S = F F^T.

The nuclear norm on the right needs no square root of an eigenvalue that is zero up to round-off, which is
what costs the usual formulas four digits when there are fewer samples than features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from evaluation.stats import FeatureStats, check_comparable
from stepdistill.errors import UserError

_EPS = float(np.finfo(np.float64).eps)
# Rows a triangular matrix is multiplied by at a time.
_BLOCK = 256


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Fréchet distance of Gaussians with the moments of `a` and `b`; good to 1e-9 of Tr S also when N <= dim.

    Raises:
        UserError: different dimensions or extractors, or fewer than two rows on a side.
        ArithmeticError: the result is negative beyond round-off; that would be a defect, so it is not clamped
            away.
    """
    return distances([a], b)[0]


def frechet_from_features(a: np.ndarray, b: np.ndarray) -> float:
    """The same of two sets of rows (N, dim) and (M, dim); at N <= dim no dim x dim matrix is made of `a`. Raises
    UserError as for `frechet_distance`, or a feature that is not finite.
    """
    a, b = np.asarray(a), np.asarray(b)
    return frechet_distance(*(FeatureStats(x.shape[-1]).add(x) for x in (a, b)))


class _Gaussian:
    """What a distance needs of statistics, each computed at most once."""

    def __init__(self, stats: FeatureStats) -> None:
        if stats.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {stats.count}; use more images.")
        self.stats, self.n = stats, stats.count
        rows = stats.rows()
        self.few = rows is not None
        if rows is not None:
            self.mean = rows.mean(axis=0)
            centred = rows - self.mean
            self.low = centred.mean(axis=0)
            centred -= self.low
            centred /= np.sqrt(self.n - 1)
            self.trace = float((centred**2).sum())
            self._centred = centred
        else:
            moments = stats.moments()
            self.mean, self.low = moments.mean, moments.low
            self.cov = moments.m2 / (self.n - 1)
            self.trace = float(np.trace(self.cov))

    @property
    def columns(self) -> int:
        """Of `factor`, at most."""
        return min(self.n - 1, self.stats.dim)

    @functools.cached_property
    def factor(self) -> tuple[np.ndarray, bool]:
        """F (dim, rank) with F F^T = cov, and whether it is lower triangular."""
        if not self.few:
            return _factor(self.cov, self.n)
        # n centred rows span n - 1 directions. The reflection which takes (1, ..., 1) to the first axis makes
        # the first row zero up to round-off and leaves the rest as n - 1 rows of the same covariance.
        return (self._centred[1:] - self._centred[0] / (1 + np.sqrt(self.n))).T, False

    def gram(self, factor: np.ndarray, triangular: bool) -> np.ndarray:
        """factor^T cov factor, of which the upper triangle may be missing."""
        if self.few:
            product = self.factor[0].T @ factor
            return product.T @ product
        if not triangular:
            return factor.T @ (self.cov @ factor)
        # Only the lower triangle of the factor and of the result is gone through: half and a third of the work.
        dim = len(factor)
        half, gram = np.empty_like(factor), np.zeros_like(factor)
        for start in range(0, dim, _BLOCK):
            block = slice(start, start + _BLOCK)
            half[:, block] = self.cov[:, start:] @ factor[start:, block]
        for start in range(0, dim, _BLOCK):
            stop = min(start + _BLOCK, dim)
            gram[start:stop, :stop] = factor[start:, start:stop].T @ half[start:, :stop]
        return gram


def distances(many: Sequence[FeatureStats], b: FeatureStats) -> list[float]:
    """Distance of each of `many` to `b`, factoring b's covariance once."""
    for stats in many:
        check_comparable(stats, b)
    reference = _Gaussian(b)
    return [_distance(_Gaussian(stats), reference) for stats in many]


def _distance(a: _Gaussian, b: _Gaussian) -> float:
    offset = (a.mean - b.mean) + (a.low - b.low)
    traces = a.trace + b.trace
    apart = float(offset @ offset) + traces
    narrow, wide = (a, b) if a.columns < b.columns else (b, a)
    root, error = _trace_of_root(narrow, wide)
    if 2 * error > 1e-10 * (apart - 2 * root):
        root = float(np.linalg.svd(wide.factor[0].T @ narrow.factor[0], compute_uv=False).sum())
    value = apart - 2 * root
    if value >= 0:
        return value
    if value >= -1e-8 * traces:
        return 0.0
    raise ArithmeticError(
        f"the Fréchet distance came out as {value:.3g} with traces {traces:.3g}, below round-off."
    )


def _trace_of_root(narrow: _Gaussian, wide: _Gaussian) -> tuple[float, float]:
    """T = Tr (Sa Sb)^(1/2) from the eigenvalues of F^T S F, and how wrong it may be.

    That is several times cheaper than singular values, but an eigenvalue has an error of the order of eps *
    largest, of either sign, which its root magnifies. Summed as if independent, these are 300 to 10,000 times
    what is found by comparison with singular values (spectra falling like k^-0.6 to k^-3, N from 300 to 5,000
    at 512 features, equal and different N), so a hundredth is reported.
    """
    gram = torch.tensor(wide.gram(*narrow.factor))
    values = torch.linalg.eigvalsh(gram, UPLO="L").numpy()
    if not len(values) or values[0] <= 0:
        return 0.0, float("inf")
    return float(np.sqrt(values).sum()), 0.01 * _EPS * values[-1] * float(np.sqrt((1 / values).sum()))


def _factor(cov: np.ndarray, n: int) -> tuple[np.ndarray, bool]:
    """F, F F^T = cov: (dim, dim) Cholesky if safely positive definite, else (dim, rank) from eigenvectors.

    The second value tells the first kind, which is lower triangular.
    """
    dim = len(cov)
    if n > dim:
        try:
            lower = np.linalg.cholesky(cov)
        except np.linalg.LinAlgError:
            pass
        else:
            pivots = np.diagonal(lower)
            if pivots.min() > 1e-7 * pivots.max():
                return lower, True
    values, vectors = np.linalg.eigh(cov)
    # n rows minus their mean span n - 1 directions; every further eigenvalue is round-off.
    keep = (values > dim * _EPS * max(values[-1], 0.0)) & (np.arange(dim) >= dim - (n - 1))
    return vectors[:, keep] * np.sqrt(values[keep]), False
