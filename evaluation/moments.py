"""Count, mean and centred second moment of rows, merged without losing digits.

The merge is that of Chan, Golub and LeVeque (1983), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stepdistill.errors import UserError


@dataclass(frozen=True)
class Source:
    """What made the features. Two sets of statistics can be compared only if theirs agree.

    sha256: of the extractor's weights. resize: what was done to images before the network.
    """

    extractor: str = ""
    sha256: str = ""
    resize: str = "none"


@dataclass(frozen=True)
class Moments:
    """n rows with mean `mean + low` (dim,) and this sum of centred outer products (dim, dim).

    `low` is what rounding took from the mean. Without it, features far from zero would lose their digits in
    the difference of two chunks' means.
    """

    n: int
    mean: np.ndarray
    low: np.ndarray
    m2: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, rows: np.ndarray) -> Moments:
        mean = rows.mean(axis=0)
        centred = rows - mean
        low = centred.mean(axis=0)
        centred -= low
        return cls(len(rows), mean, low, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        if not self.n or not other.n:
            return other if other.n else self
        n = self.n + other.n
        delta = (other.mean - self.mean) + (other.low - self.low)
        step = self.low + delta * (other.n / n)
        mean = self.mean + step
        taken = mean - self.mean
        # What `mean` lost, exactly (Knuth's two-sum).
        low = (self.mean - (mean - taken)) + (step - taken)
        return Moments(n, mean, low, self.m2 + other.m2 + np.outer(delta, delta) * (self.n * (other.n / n)))


def as_rows(features: np.ndarray | torch.Tensor, dim: int, first: int) -> np.ndarray:
    """Features as float64 rows (N, dim), of whatever precision they are; `first` is the index of row 0. Raises
    UserError for another shape, or a value which is not finite.
    """
    if isinstance(features, torch.Tensor):
        # NumPy knows no bfloat16.
        features = features.detach().double().cpu().numpy()
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise UserError(
            f"features must have shape (N, {dim}), got {tuple(rows.shape)}; use one extractor for all."
        )
    if not np.isfinite(rows).all():
        bad = first + int((~np.isfinite(rows).all(axis=1)).argmax())
        raise UserError(f"the features of image {bad} are NaN or infinite; look at that image.")
    return rows
