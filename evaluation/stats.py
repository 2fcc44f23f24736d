"""Means and covariances of features in one pass, kept in a file with what made them.

Chunks of a fixed number of rows are formed by sample index, so a result has the same bits whatever the batch
size of the caller was. As long as there are no more rows than features the rows themselves are kept instead
(they are then the smaller of the two): centred, they are an exact factor of the covariance.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evaluation.facts import Facts
from evaluation.foreign import foreign
from evaluation.moments import Moments, Source, as_rows
from evaluation.pickles import refuse_pickle
from evaluation.settings import Place
from stepdistill.errors import UserError, atomic_write

CHUNK_ROWS = 250
# What is read of a file; others hold images too.
_ARRAYS = ("meta", "rows", "n", "mu", "low", "m2", "sigma", "num_images", "mu_s", "sigma_s", "hashes")


class FeatureStats:
    """Count, mean and covariance of rows of features, in float64 and in bounded memory.

    >>> stats = FeatureStats(128)
    >>> stats.add(features)                 # (N, 128) float32 or float64, as often as wanted
    >>> stats.n, stats.mean, stats.cov      # int, (128,), (128, 128)
    """

    def __init__(self, dim: int, source: Source | None = None) -> None:
        self.dim = int(dim)
        self.source = source or Source()
        # Of the images, where that is known, and what was done to them before the extractor saw them.
        self.facts: Facts | None = None
        self.prepared = ""
        # What a reader has to know of a file that another tool wrote.
        self.doubts: list[str] = []
        self._state = Moments.empty(self.dim)
        # All full chunks; None once there are more than dim rows.
        self._chunks: list[np.ndarray] | None = []
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
        rows = as_rows(features, self.dim, self.count)
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
        """Take all the rows of `other`. It must come from the same extractor. Raises UserError if the two have
        different dimensions or sources.
        """
        check_comparable(self, other)
        if not (self._count_known and other._count_known):
            raise UserError("statistics whose file does not say the number of images cannot be merged.")
        mine, others = self.rows(), other.rows()
        if mine is not None and others is not None and len(mine) + len(others) <= self.dim:
            self._chunks, self._waiting = [], 0
            return self.add(np.concatenate([mine, others]))
        self._state, self._chunks, self._waiting = self.moments().merged(other.moments()), None, 0
        return self

    @property
    def n(self) -> int:
        """Number of rows; 0 also where a foreign file does not say it."""
        return self.count if self._count_known else 0

    @property
    def mean(self) -> np.ndarray:
        """(dim,), float64."""
        return self.moments().mean

    @property
    def cov(self) -> np.ndarray:
        """(dim, dim), float64, with N - 1 in the denominator. Raises UserError if there are fewer than two rows."""
        moments = self.moments()
        if moments.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {moments.n}; use more images.")
        return moments.m2 / (moments.n - 1)

    def sha256(self) -> str:
        """Of mean and covariance."""
        moments = self.moments()
        return hashlib.sha256(moments.mean.tobytes() + moments.m2.tobytes()).hexdigest()

    def save(self, path: Place) -> Path:
        """Write an .npz file with the moments (or the few rows) and what made them. Returns its path.

        Other tools read `mu` and `sigma` of it (pytorch-fid, clean-fid, EDM); the rest is what keeps every bit.
        """
        path, rows, moments = Path(path), self.rows(), self.moments()
        arrays = {"n": self.n, "mu": moments.mean, "sigma": moments.m2 / max(moments.n - 1, 1)}
        if rows is None or not self._count_known:
            arrays |= {"low": moments.low, "m2": moments.m2}
        else:
            arrays |= {"rows": rows}
        meta = {
            "format": "stepdistill-stats-2",
            "count": self.n,
            "prepared": self.prepared,
            **asdict(self.source),
        }
        if self.facts is not None:
            meta["facts"] = {name: value for name, value in vars(self.facts).items() if name != "hashes"}
            arrays["hashes"] = np.frombuffer(self.facts.hashes, np.uint64)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, meta=np.array(json.dumps(meta, sort_keys=True)))
        return path

    @classmethod
    def load(cls, path: Place, expect: Source | None = None) -> FeatureStats:
        """Read what `save` wrote, or an .npz file with `mu` and `sigma` as EDM, ADM, pytorch-fid and clean-fid
        publish. Nothing is unpickled.

        Such a foreign file does not say what made it: see `evaluation.foreign`. Its `doubts` say what is not known,
        and its `n` is 0 unless the file has a count. Raises UserError for no such file, a pickle, not a statistics
        file, damaged, or made by another extractor than `expect`.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"no statistics file at {path}; `python -m evaluation stats DIR -o {path}` makes one."
            )
        refuse_pickle(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in _ARRAYS if key in file.files}
            if "meta" not in arrays:
                return foreign(cls, path, arrays, expect)
            meta = json.loads(str(arrays["meta"]))
            source = Source(meta["extractor"], meta["sha256"], meta["resize"])
            stats = cls._from_arrays(path, arrays, source)
            stats.prepared = meta.get("prepared", "")
            if facts := meta.get("facts"):
                hashes = array("Q", arrays["hashes"].astype(np.uint64).tobytes())
                size, traits = facts["size"] and tuple(facts["size"]), Counter(facts["traits"])
                stats.facts = Facts(facts["n"], size, traits, hashes, facts["skipped"])
        except UserError:
            raise
        # zipfile, json, key and value errors all mean the same to a reader.
        except Exception as error:
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
        """Statistics with this mean (dim,) and covariance (dim, dim) of `n` rows; None: not known. Raises UserError if
        the shapes don't fit, a value is not finite, or `n` is below 2.
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
        # With an unknown count the rank is read off the matrix.
        count = mean.size + 1 if n is None else n
        stats._state = Moments(count, mean, np.zeros_like(mean), cov * (count - 1))
        stats._chunks, stats._count_known = None, n is not None
        return stats

    @classmethod
    def _from_arrays(cls, path: Path, arrays: dict[str, np.ndarray], source: Source) -> FeatureStats:
        if "rows" in arrays:
            rows = arrays["rows"].astype(np.float64)
            if rows.ndim != 2 or len(rows) != int(arrays["n"]) or not np.isfinite(rows).all():
                raise UserError(f"{path} holds damaged features (shape {rows.shape}); make it again.")
            return cls(rows.shape[1], source).add(rows)
        moments = Moments(int(arrays["n"]), *(arrays[key].astype(np.float64) for key in ("mu", "low", "m2")))
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
        # A foreign file's, saved again.
        if not moments.n:
            return cls.of_moments(mean, m2 / mean.size, None, source)
        stats = cls(mean.size, source)
        stats._state, stats._chunks = moments, None
        return stats

    @property
    def count(self) -> int:
        kept = sum(map(len, self._chunks)) if self._chunks is not None else self._state.n
        return kept + self._waiting

    def _keep(self, chunk: np.ndarray) -> None:
        """Take a full chunk."""
        if self._chunks is None:
            self._state = self._state.merged(Moments.of(chunk))
        else:
            self._chunks.append(chunk)
            if sum(map(len, self._chunks)) > self.dim:
                self._state, self._chunks = self._merged_chunks(), None

    def _merged_chunks(self) -> Moments:
        moments = self._state
        for chunk in self._chunks or ():
            moments = moments.merged(Moments.of(chunk))
        return moments

    def rows(self) -> np.ndarray | None:
        """All rows (n, dim) while there are no more than dim of them, else None."""
        if self._chunks is None or self.count > self.dim:
            return None
        return np.concatenate([*self._chunks, self._buffer[: self._waiting]])

    def moments(self) -> Moments:
        """The moments of all rows, also of those still waiting for a full chunk; the object is not changed."""
        moments = self._merged_chunks()
        if not self._waiting:
            return moments
        return moments.merged(Moments.of(self._buffer[: self._waiting]))


def check_comparable(a: FeatureStats, b: FeatureStats) -> None:
    if a.dim != b.dim:
        raise UserError(
            f"statistics of {a.dim} and of {b.dim} features cannot be compared; use one extractor for both."
        )
    _check_source(a.source, b.source, "the first statistics")


def _check_source(made: Source, expected: Source, what: str) -> None:
    for field in ("extractor", "sha256", "resize"):
        ours, theirs = getattr(made, field), getattr(expected, field)
        if ours != theirs:
            raise UserError(
                f"{what} were made with {field} {ours!r}, but {theirs!r} is in use; make them again with it."
            )
