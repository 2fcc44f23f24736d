"""Means and covariances of features in one pass, and the Fréchet distance between two of them.

The Fréchet distance of two Gaussians (Dowson and Landau 1982; of image features: Heusel et al. 2017, arXiv
1706.08500) is

    |m1 - m2|^2 + Tr S1 + Tr S2 - 2 T,     T = Tr (S1 S2)^(1/2) = || F1^T F2 ||_* if S = F F^T.

The nuclear norm on the right needs no square root of an eigenvalue that is zero up to round-off, which is
what costs the usual formulas four digits when there are fewer samples than features.

Features are accumulated in float64 by the merge of Chan, Golub and LeVeque (1983): count, mean and centred
second moment. Chunks of a fixed number of rows are formed by sample index, so a result has the same bits
whatever the batch size of the caller was. As long as there are no more rows than features the rows themselves
are kept instead (they are then the smaller of the two): centred, they are an exact factor F. Ten disjoint
folds are kept apart, which gives standard errors by the delete-one-fold jackknife, and an estimate of the
distance at infinitely many samples, without storing a single feature beyond that.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from stepdistill.errors import UserError, atomic_write

CHUNK_ROWS = 250
FOLDS = 10
_EPS = float(np.finfo(np.float64).eps)
_BLOCK = 256  # rows a triangular matrix is multiplied by at a time
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


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
        self.marked = True  # the file it was read from, if any, said what made it
        self._state = _Moments.empty(self.dim)
        self._chunks: list[np.ndarray] | None = []  # all full chunks; None once there are more than dim rows
        self._buffer = np.empty((CHUNK_ROWS, self.dim))
        self._waiting = 0
        self._count_known = True

    def add(self, features: np.ndarray) -> FeatureStats:
        """Take the next rows, in order of sample index.

        Args:
            features: (N, dim), a NumPy array or a CPU tensor.

        Raises:
            UserError: another number of columns, or a value which is not finite.
        """
        rows = _as_rows(features, self.dim, self._count)
        while len(rows):
            taken = rows[: CHUNK_ROWS - self._waiting]
            self._buffer[self._waiting : self._waiting + len(taken)] = taken
            self._waiting += len(taken)
            rows = rows[len(taken) :]
            if self._waiting == CHUNK_ROWS:
                self._keep(self._buffer.copy())
                self._waiting = 0
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Take all the rows of `other`. It must come from the same extractor.

        Raises:
            UserError: the two have different dimensions or sources.
        """
        _check_comparable(self, other)
        if not (self._count_known and other._count_known):
            raise UserError("statistics whose file does not say the number of images cannot be merged.")
        mine, others = self._rows(), other._rows()
        if mine is not None and others is not None and len(mine) + len(others) <= self.dim:
            self._chunks, self._waiting = [], 0
            return self.add(np.concatenate([mine, others]))
        self._state, self._chunks, self._waiting = self._moments().merged(other._moments()), None, 0
        return self

    @property
    def n(self) -> int:
        """Number of rows; 0 also where a foreign file does not say it."""
        return self._count if self._count_known else 0

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
        """Write an .npz file with the moments (or the few rows) and what made them. Returns its path."""
        path, rows = Path(path), self._rows()
        if rows is None or not self._count_known:
            moments = self._moments()
            arrays = {"n": self.n, "mu": moments.mean, "low": moments.low, "m2": moments.m2}
        else:
            arrays = {"n": self.n, "rows": rows}
        meta = {"format": "stepdistill-stats-2", "count": self.n, **asdict(self.source)}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, meta=np.array(json.dumps(meta, sort_keys=True)))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], expect: Source | None = None) -> FeatureStats:
        """Read what `save` wrote, or an .npz file with `mu` and `sigma` as EDM, ADM, pytorch-fid and clean-fid
        publish. Nothing is unpickled.

        Such a foreign file does not say what made it. It is taken for statistics of Inception features where
        `expect` is an Inception extractor, is marked as such a one, and `marked` is False; its `n` is 0
        unless the file has a count.

        Raises:
            UserError: no such file, a pickle, not a statistics file, damaged, or made by another extractor
                than `expect`.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"no statistics file at {path}; `python -m evaluation stats DIR -o {path}` makes one."
            )
        refuse_pickle(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                # A file of ours lists its arrays by these names; others hold images too, which are not read.
                found = {
                    key: file[key]
                    for key in ("meta", "rows", "n", "mu", "low", "m2", "sigma", "num_images")
                    if key in file.files
                }
            if "meta" not in found:
                return cls._foreign(path, found, expect)
            meta = json.loads(str(found["meta"]))
            source = Source(meta["extractor"], meta["sha256"], meta["resize"])
            stats = cls._from_arrays(path, found, source)
        except UserError:
            raise
        except Exception as error:  # zipfile, json, key and value errors all mean the same to a reader
            raise UserError(
                f"{path} is not a statistics file of ours ({type(error).__name__}); make it again with "
                f"`python -m evaluation stats DIR -o {path}`."
            ) from None
        if expect is not None:
            _check_source(source, expect, f"the statistics in {path}")
        return stats

    @classmethod
    def of_moments(
        cls, mean: np.ndarray, cov: np.ndarray, n: int | None = None, source: Source | None = None
    ) -> FeatureStats:
        """Statistics with this mean (dim,) and covariance (dim, dim) of `n` rows; None: not known.

        Raises:
            UserError: the shapes don't fit, a value is not finite, or `n` is below 2.
        """
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
            raise UserError(
                f"a mean of shape {mean.shape} and a covariance of shape {cov.shape} don't fit; "
                "(dim,) and (dim, dim) are needed."
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise UserError("the mean or the covariance holds NaN or infinite values; make them again.")
        if n is not None and n < 2:
            raise UserError(f"a covariance needs at least 2 images, got n = {n}.")
        stats = cls(mean.size, source)
        count = mean.size + 1 if n is None else n  # with an unknown count the rank is read off the matrix
        stats._state = _Moments(count, mean, np.zeros_like(mean), cov * (count - 1))
        stats._chunks, stats._count_known = None, n is not None
        return stats

    @classmethod
    def _from_arrays(cls, path: Path, found: dict[str, np.ndarray], source: Source) -> FeatureStats:
        if "rows" in found:
            rows = found["rows"].astype(np.float64)
            if rows.ndim != 2 or len(rows) != int(found["n"]) or not np.isfinite(rows).all():
                raise UserError(f"{path} holds damaged features (shape {rows.shape}); make it again.")
            return cls(rows.shape[1], source).add(rows)
        moments = _Moments(int(found["n"]), *(found[key].astype(np.float64) for key in ("mu", "low", "m2")))
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
        if not moments.n:  # a foreign file's, saved again
            return cls.of_moments(mean, m2 / mean.size, None, source)
        stats = cls(mean.size, source)
        stats._state, stats._chunks = moments, None
        return stats

    @classmethod
    def _foreign(cls, path: Path, found: dict[str, np.ndarray], expect: Source | None) -> FeatureStats:
        if "mu" not in found or "sigma" not in found:
            raise KeyError("mu")
        if expect is None or not expect.extractor.startswith("inception-2015"):
            wanted = expect.extractor if expect else "the extractor"
            raise UserError(
                f"{path} is not a statistics file of ours: it has mu and sigma but does not say what made them; "
                f"such files hold Inception features, so use --extractor inception-2015, or make one for "
                f"{wanted!r} with `python -m evaluation stats DIR -o ref.npz`."
            )
        count = next((int(found[key]) for key in ("n", "num_images") if key in found), None)
        try:
            stats = cls.of_moments(found["mu"], found["sigma"], count, expect)
        except UserError as error:
            raise UserError(f"{path} holds damaged statistics: {error}") from None
        stats.marked = False
        return stats

    @property
    def _count(self) -> int:
        kept = sum(map(len, self._chunks)) if self._chunks is not None else self._state.n
        return kept + self._waiting

    def _keep(self, chunk: np.ndarray) -> None:
        """Take a full chunk."""
        if self._chunks is None:
            self._state = self._state.merged(_Moments.of(chunk))
        else:
            self._chunks.append(chunk)
            if sum(map(len, self._chunks)) > self.dim:
                self._state, self._chunks = self._merged_chunks(), None

    def _merged_chunks(self) -> _Moments:
        moments = self._state
        for chunk in self._chunks or ():
            moments = moments.merged(_Moments.of(chunk))
        return moments

    def _rows(self) -> np.ndarray | None:
        """All rows (n, dim) while there are no more than dim of them, else None."""
        if self._chunks is None or self._count > self.dim:
            return None
        return np.concatenate([*self._chunks, self._buffer[: self._waiting]])

    def _moments(self) -> _Moments:
        """The moments of all rows, also of those still waiting for a full chunk; the object is not changed."""
        moments = self._merged_chunks()
        if not self._waiting:
            return moments
        return moments.merged(_Moments.of(self._buffer[: self._waiting]))


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a file that is a pickle by its name."""
    if path.suffix.lower() in _PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code when it is opened; convert it where you trust it "
            "with numpy.savez(file, mu=..., sigma=...) and give the .npz file."
        )


class FoldedStats:
    """Statistics of one set of samples, kept in disjoint folds by sample index.

    Every ten consecutive samples are dealt to the ten folds in an order hashed from their index: folds are of
    one size, and with labels assigned as i mod K no class is concentrated in a fold.
    """

    def __init__(self, dim: int, source: Source | None = None) -> None:
        self.folds = [FeatureStats(dim, source) for _ in range(FOLDS)]

    def add(self, features: np.ndarray) -> FoldedStats:
        """Take the next rows (N, dim) in index order. Raises UserError as `FeatureStats.add` does."""
        rows = _as_rows(features, self.folds[0].dim, self.n)
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


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Fréchet distance of Gaussians with the moments of `a` and `b`; good to 1e-9 of Tr S also when N <= dim.

    Raises:
        UserError: different dimensions or extractors, or fewer than two rows on a side.
        ArithmeticError: the result is negative beyond round-off; that would be a defect, so it is not clamped
            away.
    """
    return _distances([a], b)[0]


def frechet_from_features(a: np.ndarray, b: np.ndarray) -> float:
    """The same of two sets of rows (N, dim) and (M, dim); at N <= dim no dim x dim matrix is made of `a`.

    Raises:
        UserError: as for `frechet_distance`, or a feature that is not finite.
    """
    a, b = np.asarray(a), np.asarray(b)
    return frechet_distance(*(FeatureStats(x.shape[-1]).add(x) for x in (a, b)))


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
        return _jackknife(self.left_out)

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
    value, *others = _distances([a.total, *left_out], b)
    return FoldDistances(value, a.n, tuple(others), tuple(stats.n for stats in left_out))


def frechet_with_error(a: FoldedStats, b: FeatureStats) -> tuple[float, float]:
    """(distance, standard error) for samples `a` against a reference `b`; see `FoldDistances`."""
    found = fold_distances(a, b)
    return found.value, found.error


def frechet_ratio_with_error(a: FoldedStats, c: FoldedStats, b: FeatureStats) -> tuple[float, float]:
    """(ratio, standard error) of distance(a, b) / distance(c, b): a student over its teacher.

    Both must be drawn for the same prompts and seeds, row by row. The same fold is left out on both sides, so
    what the two have in common cancels out of the error.

    Raises:
        UserError: the two have different numbers of samples, or the distance of `c` is zero.
    """
    _check_paired(a, c)
    above, below = fold_distances(a, b), fold_distances(c, b)
    if below.value == 0 or not all(below.left_out):
        raise UserError("the ratio of two distances is undefined: the distance in the denominator is zero.")
    ratios = [x / y for x, y in zip(above.left_out, below.left_out, strict=True)]
    return above.value / below.value, _jackknife(ratios)


def frechet_paired_with_error(a: FoldedStats, c: FoldedStats) -> tuple[float, float]:
    """(distance, standard error) of two sets of samples of the same prompts and seeds, row by row.

    The same fold is left out on both sides. Raises UserError when they have different numbers of samples.
    """
    _check_paired(a, c)
    value = frechet_distance(a.total, c.total)
    pairs = zip(a.left_out(), c.left_out(), strict=True)
    return value, _jackknife([frechet_distance(x, y) for x, y in pairs])


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


class _Gaussian:
    """What a distance needs of statistics, each computed at most once."""

    def __init__(self, stats: FeatureStats) -> None:
        if stats._count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {stats._count}; use more images.")
        self.stats, self.n = stats, stats._count
        rows = stats._rows()
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
            moments = stats._moments()
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


def _distances(many: Sequence[FeatureStats], b: FeatureStats) -> list[float]:
    """Distance of each of `many` to `b`, factoring b's covariance once."""
    for stats in many:
        _check_comparable(stats, b)
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


def _as_rows(features: np.ndarray, dim: int, first: int) -> np.ndarray:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise UserError(
            f"features must have shape (N, {dim}), got {tuple(rows.shape)}; use one extractor for all."
        )
    if not np.isfinite(rows).all():
        bad = first + int((~np.isfinite(rows).all(axis=1)).argmax())
        raise UserError(f"the features of image {bad} are NaN or infinite; look at that image.")
    return rows


def _check_paired(a: FoldedStats, c: FoldedStats) -> None:
    if a.n != c.n:
        raise UserError(
            f"a comparison row by row needs the same samples on both sides, got {a.n} and {c.n} images."
        )


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
