"""Means and covariances of features in one pass, and the Fréchet distance between two of them.

The Fréchet distance of two Gaussians (Dowson and Landau 1982; of image features: Heusel et al. 2017, arXiv
1706.08500) is

    |m1 - m2|^2 + Tr S1 + Tr S2 - 2 T,     T = Tr (S1 S2)^(1/2) = || F1^T F2 ||_* if S = F F^T.

The nuclear norm on the right needs no square root of an eigenvalue that is zero up to round-off, which is
what costs the usual formulas four digits when there are fewer samples than features.

Features are accumulated in float64 by the merge of Chan, Golub and LeVeque (1983): count, mean and centred
second moment. Chunks of a fixed number of rows are formed by sample index, so a result has the same bits
whatever the batch size of the caller was. Ten disjoint folds are kept apart, which gives standard errors by
the delete-one-fold jackknife without storing a single feature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stepdistill.errors import UserError, atomic_write

CHUNK_ROWS = 250
FOLDS = 10
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Source:
    """What made the features. Two sets of statistics can be compared only if theirs agree."""

    extractor: str = ""
    sha256: str = ""  # of the extractor's weights
    resize: str = "none"  # what was done to images before the network


class FeatureStats:
    """Count, mean and covariance of rows of features, in float64 and in bounded memory.

    >>> stats = FeatureStats(128)
    >>> stats.add(features)                 # (N, 128) float32 or float64, as often as wanted
    >>> stats.n, stats.mean, stats.cov      # int, (128,), (128, 128)
    """

    def __init__(self, dim: int, source: Source | None = None) -> None:
        self.dim = int(dim)
        self.source = source or Source()
        self._state = _Moments.empty(self.dim)
        self._buffer = np.empty((CHUNK_ROWS, self.dim))
        self._waiting = 0

    def add(self, features: np.ndarray) -> FeatureStats:
        """Take the next rows, in order of sample index.

        Args:
            features: (N, dim), a NumPy array or a CPU tensor.

        Raises:
            UserError: another number of columns, or a value which is not finite.
        """
        rows = _as_rows(features, self.dim)
        while len(rows):
            taken = rows[: CHUNK_ROWS - self._waiting]
            self._buffer[self._waiting : self._waiting + len(taken)] = taken
            self._waiting += len(taken)
            rows = rows[len(taken) :]
            if self._waiting == CHUNK_ROWS:
                self._state, self._waiting = self._moments(), 0
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Take all the rows of `other`. It must come from the same extractor.

        Raises:
            UserError: the two have different dimensions or sources.
        """
        _check_comparable(self, other)
        self._state, self._waiting = self._moments().merged(other._moments()), 0
        return self

    @property
    def n(self) -> int:
        return self._state.n + self._waiting

    @property
    def mean(self) -> np.ndarray:
        """(dim,), float64."""
        return self._moments().mean

    @property
    def cov(self) -> np.ndarray:
        """(dim, dim), float64, with N - 1 in the denominator.

        Raises:
            UserError: there are fewer than two rows.
        """
        moments = self._moments()
        if moments.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {moments.n}; use more images.")
        return moments.m2 / (moments.n - 1)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an .npz file with the moments and what made them. Returns its path."""
        moments = self._moments()
        path = Path(path)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            meta = json.dumps(
                {"format": "stepdistill-stats-1", "count": moments.n, **asdict(self.source)}, sort_keys=True
            )
            np.savez(file, n=moments.n, mu=moments.mean, low=moments.low, m2=moments.m2, meta=np.array(meta))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], expect: Source | None = None) -> FeatureStats:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            UserError: no such file, not a statistics file, damaged, or made by another extractor than
                `expect`.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"no statistics file at {path}; `python -m evaluation stats DIR -o {path}` makes one."
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                moments = _Moments(
                    int(file["n"]), *(file[key].astype(np.float64) for key in ("mu", "low", "m2"))
                )
            source = Source(meta["extractor"], meta["sha256"], meta["resize"])
        except Exception as error:  # zipfile, json, key and value errors all mean the same to a reader
            raise UserError(
                f"{path} is not a statistics file of ours ({type(error).__name__}); make it again with "
                f"`python -m evaluation stats DIR -o {path}`."
            ) from None
        mean, low, m2 = moments.mean, moments.low, moments.m2
        shaped = (
            mean.ndim == 1
            and low.shape == mean.shape
            and m2.shape == (mean.size, mean.size)
            and moments.n >= 0
        )
        if not shaped or not all(np.isfinite(part).all() for part in (mean, low, m2)):
            raise UserError(
                f"{path} holds damaged statistics (shapes {mean.shape} and {m2.shape}); make it again."
            )
        if expect is not None:
            _check_source(source, expect, f"the statistics in {path}")
        stats = cls(mean.size, source)
        stats._state = moments
        return stats

    def _moments(self) -> _Moments:
        """The state with the rows still waiting for a full chunk; the object itself is not changed."""
        if not self._waiting:
            return self._state
        return self._state.merged(_Moments.of(self._buffer[: self._waiting]))


class FoldedStats:
    """Statistics of one set of samples, kept in disjoint folds by sample index.

    Every ten consecutive samples are dealt to the ten folds in an order hashed from their index: folds are of
    one size, and with labels assigned as i mod K no class is concentrated in a fold.
    """

    def __init__(self, dim: int, source: Source | None = None) -> None:
        self.folds = [FeatureStats(dim, source) for _ in range(FOLDS)]

    def add(self, features: np.ndarray) -> FoldedStats:
        """Take the next rows (N, dim) in index order. Raises UserError as `FeatureStats.add` does."""
        rows = _as_rows(features, self.folds[0].dim)
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
        return self.without(None)

    def without(self, k: int | None) -> FeatureStats:
        """All folds but the k-th, merged in order."""
        merged = FeatureStats(self.folds[0].dim, self.source)
        for index, fold in enumerate(self.folds):
            if index != k:
                merged.merge(fold)
        return merged


def fold_of(index: np.ndarray) -> np.ndarray:
    """Fold number, 0 to 9, of each sample index: the rank of its hash among those of its block of ten."""
    index = np.asarray(index, dtype=np.uint64)
    block = index[:, None] // np.uint64(FOLDS) * np.uint64(FOLDS) + np.arange(FOLDS, dtype=np.uint64)
    return (_hash(block) < _hash(index)[:, None]).sum(axis=1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Fréchet distance of Gaussians with the moments of `a` and `b`; good to 1e-9 of Tr S also when N <= dim.

    Raises:
        UserError: different dimensions or extractors, or fewer than two rows on a side.
        ArithmeticError: the result is negative beyond round-off; that would be a defect, so it is not clamped
            away.
    """
    return _distances([a], b)[0]


def frechet_with_error(a: FoldedStats, b: FeatureStats) -> tuple[float, float]:
    """(distance, standard error) for samples `a` against a reference `b` which is taken as given.

    The error is the delete-one-fold jackknife (Efron and Stein 1981): it says how much the number would move
    with other prompts and other noise, not with another reference. It is NaN when there are too few samples
    to leave a fold out.
    """
    value, left_out = _with_folds(a, b)
    return value, _jackknife(left_out)


def frechet_ratio_with_error(a: FoldedStats, c: FoldedStats, b: FeatureStats) -> tuple[float, float]:
    """(ratio, standard error) of distance(a, b) / distance(c, b): a student over its teacher.

    Both must be drawn for the same prompts and seeds, row by row. The same fold is left out on both sides, so
    what the two have in common cancels out of the error.

    Raises:
        UserError: the two have different numbers of samples, or the distance of `c` is zero.
    """
    if a.n != c.n:
        raise UserError(
            f"a ratio of distances needs the same samples on both sides, got {a.n} and {c.n} images."
        )
    above, above_left_out = _with_folds(a, b)
    below, below_left_out = _with_folds(c, b)
    if below == 0 or not all(below_left_out):
        raise UserError("the ratio of two distances is undefined: the distance in the denominator is zero.")
    return above / below, _jackknife([x / y for x, y in zip(above_left_out, below_left_out, strict=True)])


@dataclass(frozen=True)
class _Moments:
    """n rows with mean `mean + low` (dim,) and this sum of centred outer products (dim, dim).

    `low` is what rounding took from the mean. Without it, features far from zero would lose their digits in
    the difference of two chunks' means.
    """

    n: int
    mean: np.ndarray
    low: np.ndarray
    m2: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> _Moments:
        return cls(0, np.zeros(dim), np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, rows: np.ndarray) -> _Moments:
        mean = rows.mean(axis=0)
        centred = rows - mean
        low = centred.mean(axis=0)
        centred -= low
        return cls(len(rows), mean, low, centred.T @ centred)

    def merged(self, other: _Moments) -> _Moments:
        if not self.n or not other.n:
            return other if other.n else self
        n = self.n + other.n
        delta = (other.mean - self.mean) + (other.low - self.low)
        step = self.low + delta * (other.n / n)
        mean = self.mean + step
        taken = mean - self.mean
        low = (self.mean - (mean - taken)) + (step - taken)  # what `mean` lost, exactly (Knuth's two-sum)
        return _Moments(n, mean, low, self.m2 + other.m2 + np.outer(delta, delta) * (self.n * (other.n / n)))


def _distances(many: Sequence[FeatureStats], b: FeatureStats) -> list[float]:
    """Distance of each of `many` to `b`, factoring b's covariance once."""
    factor = _factor(b.cov, b.n)
    return [_distance(a, b, factor) for a in many]


def _distance(a: FeatureStats, b: FeatureStats, factor_b: np.ndarray) -> float:
    _check_comparable(a, b)
    offset = a.mean - b.mean
    cov_a = a.cov
    traces = float(np.trace(cov_a) + np.trace(b.cov))
    value = float(offset @ offset) + traces - 2.0 * _trace_of_root(cov_a, a.n, factor_b)
    if value >= 0:
        return value
    if value >= -1e-8 * traces:
        return 0.0
    raise ArithmeticError(
        f"the Fréchet distance came out as {value:.3g} with traces {traces:.3g}, below round-off."
    )


def _trace_of_root(cov_a: np.ndarray, n_a: int, factor_b: np.ndarray) -> float:
    """T = Tr (Sa Sb)^(1/2), given Sb = factor_b factor_b^T."""
    dim = len(cov_a)
    if n_a > dim and factor_b.shape[1] == dim:
        # Several times cheaper than singular values, but each eigenvalue has an error of eps * largest, of
        # either sign, which its root magnifies. Taken where these add up to far less than 1e-9.
        values = np.linalg.eigvalsh(factor_b.T @ cov_a @ factor_b)
        if values[0] > 0:
            total = float(np.sqrt(values).sum())
            if _EPS * values[-1] * float(np.sqrt((1 / values).sum())) < 1e-11 * total:
                return total
    return float(np.linalg.svd(_factor(cov_a, n_a).T @ factor_b, compute_uv=False).sum())


def _factor(cov: np.ndarray, n: int) -> np.ndarray:
    """F, F F^T = cov: (dim, dim) Cholesky if safely positive definite, else (dim, rank) from eigenvectors."""
    dim = len(cov)
    if n > dim:
        try:
            lower = np.linalg.cholesky(cov)
        except np.linalg.LinAlgError:
            pass
        else:
            pivots = np.diagonal(lower)
            if pivots.min() > 1e-7 * pivots.max():
                return lower
    values, vectors = np.linalg.eigh(cov)
    # n rows minus their mean span n - 1 directions; every further eigenvalue is round-off.
    keep = (values > dim * _EPS * max(values[-1], 0.0)) & (np.arange(dim) >= dim - (n - 1))
    return vectors[:, keep] * np.sqrt(values[keep])


def _with_folds(a: FoldedStats, b: FeatureStats) -> tuple[float, list[float]]:
    """The distance of all samples, and those with each fold left out (none when that is not possible)."""
    used = [k for k, fold in enumerate(a.folds) if fold.n]
    left_out = [a.without(k) for k in used]
    if len(used) < 2 or min(stats.n for stats in left_out) < 2:
        left_out = []
    value, *others = _distances([a.total, *left_out], b)
    return value, others


def _jackknife(left_out: Sequence[float]) -> float:
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


def _as_rows(features: np.ndarray, dim: int) -> np.ndarray:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise UserError(
            f"features must have shape (N, {dim}), got {tuple(rows.shape)}; use one extractor for all."
        )
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).argmax())
        raise UserError(
            f"the features of image {bad} of a batch of {len(rows)} are NaN or infinite; look at that image."
        )
    return rows


def _check_comparable(a: FeatureStats, b: FeatureStats) -> None:
    if a.dim != b.dim:
        raise UserError(
            f"statistics of {a.dim} and of {b.dim} features cannot be compared; use one extractor for both."
        )
    _check_source(a.source, b.source, "the first statistics")


def _check_source(found: Source, expected: Source, what: str) -> None:
    for field in ("extractor", "sha256", "resize"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        if ours != theirs:
            raise UserError(
                f"{what} were made with {field} {ours!r}, but {theirs!r} is in use; make them again with it."
            )
