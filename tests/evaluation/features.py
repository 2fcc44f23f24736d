"""Rows of features with known moments, for tests of statistics."""

from __future__ import annotations

import numpy as np

from evaluation.folds import FoldedStats, fold_distances
from evaluation.stats import FeatureStats, Source


def stats_of(rows: np.ndarray, batch: int | None = None, source: Source | None = None) -> FeatureStats:
    stats = FeatureStats(rows.shape[1], source)
    for start in range(0, len(rows), batch or max(len(rows), 1)):
        stats.add(rows[start : start + (batch or len(rows))])
    return stats


def folded(rows: np.ndarray, batch: int | None = None) -> FoldedStats:
    stats = FoldedStats(rows.shape[1])
    for start in range(0, len(rows), batch or len(rows)):
        stats.add(rows[start : start + (batch or len(rows))])
    return stats


def frechet_with_error(a: FoldedStats, b: FeatureStats) -> tuple[float, float]:
    found = fold_distances(a, b)
    return found.value, found.error


def exactly(mean: np.ndarray, cov: np.ndarray, n: int = 1000) -> FeatureStats:
    """Statistics with exactly these moments, from whitened and coloured rows."""
    rows = np.random.default_rng(len(mean)).standard_normal((n, len(mean)))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T).reshape(len(mean), -1))).T
    return stats_of(rows @ np.linalg.cholesky(cov).T + mean)


def correlated(rng: np.random.Generator, n: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """Rows whose spectrum falls like that of a network's features."""
    mix = np.linalg.qr(np.random.default_rng(5).standard_normal((dim, dim)))[0] * (
        np.arange(1, dim + 1) ** -0.7
    )
    return rng.standard_normal((n, dim)) @ mix.T + shift


def nuclear_truth(x: np.ndarray, y: np.ndarray) -> float:
    """The definition with the centred features themselves as factors: no covariance and no root of one."""
    fx, fy = (z - z.mean(0) for z in (x, y))
    fx, fy = fx / np.sqrt(len(x) - 1), fy / np.sqrt(len(y) - 1)
    norm = np.linalg.svd(fx @ fy.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (fx**2).sum() + (fy**2).sum() - 2 * norm
