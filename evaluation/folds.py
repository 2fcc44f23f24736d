"""Standard errors without keeping features: samples in ten disjoint folds, and what leaving one out changes.

Folds are dealt by sample index. The delete-one-fold jackknife gives standard errors of distances and of their
ratios, and the pseudo-values an estimate of the distance at infinitely many samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.frechet import distances, frechet_distance
from evaluation.stats import FeatureStats, Source, as_rows
from stepdistill.errors import UserError

FOLDS = 10


class FoldedStats:
    """Statistics of one set of samples, kept in disjoint folds by sample index.

    Every ten consecutive samples are dealt to the ten folds in an order hashed from their index: folds are of
    one size, and with labels assigned as i mod K no class is concentrated in a fold.
    """

    def __init__(self, dim: int, source: Source | None = None) -> None:
        self.folds = [FeatureStats(dim, source) for _ in range(FOLDS)]

    def add(self, features: np.ndarray) -> FoldedStats:
        """Take the next rows (N, dim) in index order. Raises UserError as `FeatureStats.add` does."""
        rows = as_rows(features, self.folds[0].dim, self.n)
        fold = fold_of(np.arange(self.n, self.n + len(rows)))
        for k in np.unique(fold):
            self.folds[k].add(rows[fold == k])
        return self

    @property
    def n(self) -> int:
        return sum(fold.n for fold in self.folds)

    @property
    def source(self) -> Source:
        return self.folds[0].source

    @property
    def total(self) -> FeatureStats:
        """All folds merged in order."""
        return _merge(self, range(FOLDS))

    def without(self, k: int | None) -> FeatureStats:
        """All folds but the k-th, merged in order."""
        return _merge(self, [index for index in range(FOLDS) if index != k])

    def left_out(self) -> list[FeatureStats]:
        """For each fold with samples, what the others have; empty where that is too little for a covariance.

        Each is a merge of what comes before the fold and what comes after it: 3 merges per fold, not 9.
        """
        used = [k for k, fold in enumerate(self.folds) if fold.n]
        if len(used) < 2 or self.n - max(fold.n for fold in self.folds) < 2:
            return []
        before, after = [_merge(self, [])], [_merge(self, [])]
        for k in used[:-1]:
            before.append(_merge(self, []).merge(before[-1]).merge(self.folds[k]))
        for k in used[:0:-1]:
            after.append(_merge(self, []).merge(self.folds[k]).merge(after[-1]))
        return [first.merge(last) for first, last in zip(before, reversed(after), strict=True)]


def _merge(folded: FoldedStats, which: Sequence[int]) -> FeatureStats:
    merged = FeatureStats(folded.folds[0].dim, folded.source)
    for k in which:
        merged.merge(folded.folds[k])
    return merged


def fold_of(index: np.ndarray) -> np.ndarray:
    """Fold number, 0 to 9, of each sample index: the rank of its hash among those of its block of ten."""
    index = np.asarray(index, dtype=np.uint64)
    block = index[:, None] // np.uint64(FOLDS) * np.uint64(FOLDS) + np.arange(FOLDS, dtype=np.uint64)
    return (_hash(block) < _hash(index)[:, None]).sum(axis=1)


@dataclass(frozen=True)
class FoldDistances:
    """The distance of all N samples to a reference, and those with each fold left out, of `sizes` samples.

    The reference is taken as given: errors say how much a number would move with other prompts and other
    noise, not with another reference. They are NaN when there are too few samples to leave a fold out.
    """

    value: float
    n: int
    left_out: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def error(self) -> float:
        """Standard error of `value` by the delete-one-fold jackknife (Efron and Stein 1981)."""
        return jackknife(self.left_out)

    @property
    def infinity(self) -> tuple[float, float]:
        """(distance, standard error) at infinitely many samples.

        The distance of N samples is FD + c/N to first order (Chong and Forsyth 2020, arXiv 1911.07023). Each
        fold gives N D - N_k D_k = (N - N_k) FD, whence K estimates, the pseudo-values of Quenouille (1956):
        the result is their mean, weighted by N - N_k, and its error comes from their spread. The expansion
        needs several times more samples than features; with fewer the result is still biased upwards.
        """
        if not self.left_out:
            return float("nan"), float("nan")
        out, sizes = np.asarray(self.left_out), np.asarray(self.sizes)
        weights = (self.n - sizes) / self.n
        pseudo = (self.n * self.value - sizes * out) / (self.n - sizes)
        mean = float(weights @ pseudo / weights.sum())
        k = len(pseudo)
        return mean, float(np.sqrt(((pseudo - mean) ** 2).sum() / (k * (k - 1))))


def fold_distances(a: FoldedStats, b: FeatureStats) -> FoldDistances:
    """All distances to `b` that folds of `a` allow. Raises UserError as `frechet_distance` does."""
    left_out = a.left_out()
    value, *others = distances([a.total, *left_out], b)
    return FoldDistances(value, a.n, tuple(others), tuple(stats.n for stats in left_out))


def frechet_ratio_with_error(a: FoldedStats, c: FoldedStats, b: FeatureStats) -> tuple[float, float]:
    """(ratio, standard error) of distance(a, b) / distance(c, b): a student over its teacher.

    Both must be drawn for the same prompts and seeds, row by row. The same fold is left out on both sides, so what the
    two have in common cancels out of the error. Raises UserError if the two have different numbers of samples, or the
    distance of `c` is zero.
    """
    _check_paired(a, c)
    above, below = fold_distances(a, b), fold_distances(c, b)
    if below.value == 0 or not all(below.left_out):
        raise UserError("the ratio of two distances is undefined: the distance in the denominator is zero.")
    ratios = [x / y for x, y in zip(above.left_out, below.left_out, strict=True)]
    return above.value / below.value, jackknife(ratios)


def frechet_paired_with_error(a: FoldedStats, c: FoldedStats) -> tuple[float, float]:
    """(distance, standard error) of two sets of samples of the same prompts and seeds, row by row.

    The same fold is left out on both sides. Raises UserError when they have different numbers of samples.
    """
    _check_paired(a, c)
    value = frechet_distance(a.total, c.total)
    pairs = zip(a.left_out(), c.left_out(), strict=True)
    return value, jackknife([frechet_distance(x, y) for x, y in pairs])


def jackknife(left_out: Sequence[float]) -> float:
    """Standard error from the values with each of the folds left out; NaN without any."""
    if not left_out:
        return float("nan")
    values = np.asarray(left_out)
    k = len(values)
    return float(np.sqrt((k - 1) / k * ((values - values.mean()) ** 2).sum()))


def _hash(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) of uint64: a bijection, so no two indices tie."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _check_paired(a: FoldedStats, c: FoldedStats) -> None:
    if a.n != c.n:
        raise UserError(
            f"a comparison row by row needs the same samples on both sides, got {a.n} and {c.n} images."
        )
