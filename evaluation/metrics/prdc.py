"""Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020,
arXiv 2002.09797), by blocks and with exact comparisons.

A point is inside the ball of another if its distance is at most the radius, the distance to the k-th nearest
neighbour. Distances from matrix products have round-off, which decides such a comparison wrongly for
duplicates; whatever is closer than that to a tie is computed again from the differences.
"""

from __future__ import annotations

import numpy as np

from evaluation.metrics.base import Inputs, Metric, blocks
from evaluation.values import Value, measured
from stepdistill.errors import UserError

K_PRECISION, K_DENSITY = 3, 5
_BLOCK = 1000
# Neighbours looked at beyond the k-th, so that near ties can be put in order.
_SPARE = 3


class PRDC(Metric):
    """`prdc:<extractor>/precision`, `/recall` (k = 3), `/density` and `/coverage` (k = 5); higher is better.

    Precision and density say whether samples look real, recall and coverage whether all that is real is
    drawn. Errors of the first two are those of a mean over samples. All but density lie in 0 .. 1. Values
    depend on both numbers of images.
    """

    needs = frozenset({"images", "extractor", "features", "reference_images"})
    values = tuple(
        Value(f"prdc/{name}", better="higher", main=True)
        for name in ("precision", "recall", "density", "coverage")
    )

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError where a set has no more images than neighbours are counted."""
        _check_counts(n, n if inputs.reference_images is None else len(inputs.reference_images))

    def compute(self, inputs: Inputs) -> list[Value]:
        """Raises UserError as `check` does."""
        shares = prdc(inputs.features, inputs.reference_features)
        errors = {name: (shares[name], shares[f"{name}/se"]) for name in ("precision", "density")}
        numbers = {
            f"prdc/{name}": errors.get(name, shares[name])
            for name in ("precision", "recall", "density", "coverage")
        }
        return measured(self.values, numbers, inputs.extractor.name)


def prdc(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """All four, with "precision/se" and "density/se", of rows (N, dim) and (M, dim); memory for N + M rows of a block.
    Raises UserError if a set has no more images than neighbours are counted.
    """
    _check_counts(len(samples), len(real))
    # Centred, so that little cancels in |x|^2 + |y|^2 - 2 x.y.
    mean = sum(block.sum(0) for block in blocks(real)) / len(real)
    around_sample = radii(samples, mean, (K_PRECISION,))[0]
    around_real, around_real_wide = radii(real, mean, (K_PRECISION, K_DENSITY))
    precise = np.zeros(len(samples), bool)
    dense = np.zeros(len(samples))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for i, x in _centred(samples, mean):
        for j, y in _centred(real, mean):
            squared, tolerance = _squared(x, y)
            precise[i] |= _inside(squared, around_real[j], tolerance, x, y).any(1)
            wide = _inside(squared, around_real_wide[j], tolerance, x, y)
            dense[i] += wide.sum(1)
            covered[j] |= wide.any(0)
            recalled[j] |= _inside(squared.T, around_sample[i], tolerance.T, y, x).any(1)
    dense /= K_DENSITY
    n = len(samples)
    share = precise.mean()
    return {
        "precision": float(share),
        "precision/se": float(np.sqrt(share * (1 - share) / n)),
        "recall": float(recalled.mean()),
        "density": float(dense.mean()),
        "density/se": float(dense.std(ddof=1) / np.sqrt(n)),
        "coverage": float(covered.mean()),
    }


def _check_counts(*counts: int) -> None:
    if min(counts) <= K_DENSITY:
        raise UserError(
            f"precision and recall need more than {K_DENSITY} images on each side, got {min(counts)}; use more images."
        )


def radii(rows: np.ndarray, mean: np.ndarray, ks: tuple[int, ...]) -> list[np.ndarray]:
    """For each k the squared distance (N,) of every row to its k-th nearest other row."""
    keep = min(max(ks) + 1 + _SPARE, len(rows))
    squares = [np.empty(len(rows)) for _ in ks]
    for i, x in _centred(rows, mean):
        best = np.full((len(x), 0), np.inf)
        index = np.zeros((len(x), 0), int)
        slack = np.zeros(len(x))
        for j, y in _centred(rows, mean):
            squared, tolerance = _squared(x, y)
            best = np.concatenate([best, squared], 1)
            index = np.concatenate([index, np.broadcast_to(np.arange(j.start, j.stop), squared.shape)], 1)
            slack = np.maximum(slack, tolerance.max(1))
            if best.shape[1] > keep:
                nearest = np.argpartition(best, keep - 1, axis=1)[:, :keep]
                best, index = np.take_along_axis(best, nearest, 1), np.take_along_axis(index, nearest, 1)
        # Differences of the nearest, in order; the row itself is among them at distance 0.
        exact = np.stack([_exact(x, _take(rows, mean, column)) for column in index.T], 1)
        exact.sort(axis=1)
        # What was dropped is no nearer than the farthest kept, up to round-off on both sides.
        doubtful = exact[:, max(ks)] + 2 * slack >= best.max(1)
        if keep < len(rows):
            for row in np.flatnonzero(doubtful):
                everything = [_exact(x[row], y) for _, y in _centred(rows, mean)]
                exact[row] = np.sort(np.concatenate(everything))[: exact.shape[1]]
        for radius, k in zip(squares, ks, strict=True):
            radius[i] = exact[:, k]
    return squares


def _centred(rows: np.ndarray, mean: np.ndarray):
    """(slice, block) over all rows, float64."""
    for start, block in zip(range(0, len(rows), _BLOCK), blocks(rows, _BLOCK), strict=True):
        yield slice(start, start + len(block)), block - mean


def _take(rows: np.ndarray, mean: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.asarray(rows[index], np.float64) - mean


def _exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances of rows from their differences."""
    return ((x - y) ** 2).sum(-1)


def _squared(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances (n, m), and a bound of their round-off."""
    both = (x**2).sum(1)[:, None] + (y**2).sum(1)
    eps = np.finfo(np.float64).eps
    return both - 2 * (x @ y.T), 4 * eps * np.sqrt(x.shape[1]) * both


def _inside(
    squared: np.ndarray, radius: np.ndarray, tolerance: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """(n, m): whether row i of x is within `radius` (m,) of row j of y; ties are inside."""
    inside = squared <= radius
    rows, columns = np.nonzero(np.abs(squared - radius) <= tolerance)
    for start in range(0, len(rows), _BLOCK):
        i, j = rows[start : start + _BLOCK], columns[start : start + _BLOCK]
        inside[i, j] = _exact(x[i], y[j]) <= radius[j]
    return inside
