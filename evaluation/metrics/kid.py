"""Kernel distance (KID; Binkowski et al. 2018, arXiv 1801.01401): MMD^2 with the kernel (x.y / dim + 1)^3."""

from __future__ import annotations

import numpy as np

from evaluation.metrics.base import Inputs, Metric
from evaluation.metrics.mmd import Sums
from evaluation.values import Value, measured

SUBSETS = 100
SUBSET_SIZE = 1000
# torch-fidelity's, so that its subsets are drawn.
SEED = 2020


class KernelDistance(Metric):
    """`kid:<extractor>`, lower is better; it is unbiased, so values of different N compare, and may be negative.

    The value is the U-statistic over all pairs. `kid:<extractor>/subsets` is what most papers print: the mean
    over 100 random subsets of 1,000 (`/subset_size` where there are fewer images), with `/subsets/std` their
    spread, which is no standard error of the mean.
    """

    needs = frozenset({"images", "extractor", "features", "reference_images"})
    values = (
        Value("kid", better="lower", main=True),
        Value("kid/subsets", better="lower"),
        Value("kid/subsets/std"),
        Value("kid/subset_size"),
    )

    def compute(self, inputs: Inputs) -> list[Value]:
        """The full and the subset estimate with their errors."""
        x, y = inputs.features, inputs.reference_features
        sums = Sums.of(x, y, polynomial)
        size = min(SUBSET_SIZE, len(x), len(y))
        mean, spread = by_subsets(x, y, SUBSETS, size)
        numbers = {
            "kid": (sums.squared(biased=False), sums.error(biased=False)),
            "kid/subsets": mean,
            "kid/subsets/std": spread,
            "kid/subset_size": float(size),
        }
        return measured(self.values, numbers, inputs.extractor.name)


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m) for rows (n, dim) and (m, dim)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def by_subsets(
    x: np.ndarray, y: np.ndarray, subsets: int, size: int, seed: int = SEED
) -> tuple[float, float]:
    """Mean and standard deviation of MMD^2 over random subsets of `size` rows of each."""
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        a, b = (np.asarray(z[rng.choice(len(z), size, replace=False)], np.float64) for z in (x, y))
        aa, bb, ab = polynomial(a, a), polynomial(b, b), polynomial(a, b)
        apart = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))
        values.append(apart - 2 * ab.mean())
    return float(np.mean(values)), float(np.std(values))
