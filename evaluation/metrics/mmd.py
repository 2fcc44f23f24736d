"""Maximum mean discrepancy of two sets of rows (Gretton et al. 2012), by blocks, with jackknife errors.

The sums of the kernel over all pairs of folds are kept: ten by ten numbers are enough for the estimate, for
every estimate with a fold left out, and so for a standard error, in one pass over the kernel matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluation.folds import FOLDS, fold_of, jackknife
from evaluation.metrics.base import blocks

# (n, dim), (m, dim) float64 to (n, m).
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
_BLOCK = 1000


@dataclass(frozen=True)
class Sums:
    """Sums of a kernel k over pairs of rows of x, which lie in folds, and of y.

    sizes (K,): rows of x per fold. within (K, K): over x, x. diagonal (K,): of k(x, x). cross (K,): over x, y.
    reference, reference_diagonal: over y, y and of k(y, y). m: rows of y.
    """

    sizes: np.ndarray
    within: np.ndarray
    diagonal: np.ndarray
    cross: np.ndarray
    reference: float
    reference_diagonal: float
    m: int

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, kernel: Kernel) -> Sums:
        """x (n, dim), y (m, dim); any float type, computed in float64 with memory for a block of rows."""
        fold = fold_of(np.arange(len(x)))
        parts = []
        for k in range(FOLDS):
            members = np.flatnonzero(fold == k)
            parts += [(k, members[start : start + _BLOCK]) for start in range(0, len(members), _BLOCK)]
        within, cross, diagonal = np.zeros((FOLDS, FOLDS)), np.zeros(FOLDS), np.zeros(FOLDS)
        for at, (k, index) in enumerate(parts):
            rows = np.asarray(x[index], np.float64)
            own = kernel(rows, rows)
            within[k, k] += own.sum()
            diagonal[k] += np.trace(own)
            for other, others in parts[at + 1 :]:
                total = kernel(rows, np.asarray(x[others], np.float64)).sum()
                within[k, other] += total
                within[other, k] += total
            for part in blocks(y, _BLOCK):
                cross[k] += kernel(rows, part).sum()
        reference = reference_diagonal = 0.0
        for start, rows in zip(range(0, len(y), _BLOCK), blocks(y, _BLOCK), strict=True):
            own = kernel(rows, rows)
            reference += own.sum()
            reference_diagonal += np.trace(own)
            for part in blocks(y[start + _BLOCK :], _BLOCK):
                reference += 2 * kernel(rows, part).sum()
        sizes = np.bincount(fold, minlength=FOLDS)
        return cls(sizes, within, diagonal, cross, float(reference), float(reference_diagonal), len(y))

    def squared(self, biased: bool, without: int | None = None) -> float:
        """MMD^2: the U-statistic, or the V-statistic if `biased`; leaving out the fold `without`."""
        use = np.arange(FOLDS) != (-1 if without is None else without)
        n, m = int(self.sizes[use].sum()), self.m
        xx, xy, yy = self.within[np.ix_(use, use)].sum(), self.cross[use].sum(), self.reference
        if biased:
            return float(xx / n**2 + yy / m**2 - 2 * xy / (n * m))
        xx, yy = xx - self.diagonal[use].sum(), yy - self.reference_diagonal
        return float(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))

    def error(self, biased: bool) -> float:
        """Standard error by the delete-one-fold jackknife, the reference taken as given; NaN for few rows."""
        used = np.flatnonzero(self.sizes)
        if len(used) < 2 or self.sizes.sum() - self.sizes.max() < 2:
            return float("nan")
        return jackknife([self.squared(biased, k) for k in used])
