"""CMMD (Jayasumana et al. 2024, arXiv 2401.09603): 1,000 times MMD^2 of unit vectors, Gaussian kernel, sigma 10."""

from __future__ import annotations

import numpy as np

from evaluation.metrics.base import Inputs, Metric
from evaluation.metrics.mmd import Sums
from evaluation.values import Value, measured

SIGMA = 10.0
SCALE = 1000.0


class ClipMMD(Metric):
    """`cmmd:<extractor>`, lower is better. The paper's extractor is clip-vit-l14-336.

    The value is the paper's V-statistic, which is biased upwards by the diagonal; `/unbiased` is the
    U-statistic, which compares across numbers of samples.
    """

    needs = frozenset({"images", "extractor", "features", "reference_images"})
    values = (Value("cmmd", better="lower", main=True), Value("cmmd/unbiased", better="lower"))

    def compute(self, inputs: Inputs) -> list[Value]:
        """Both estimates with their jackknife errors."""
        sums = Sums.of(inputs.features, inputs.reference_features, lambda x, y: gaussian(unit(x), unit(y)))
        numbers = {
            name: (SCALE * sums.squared(biased), SCALE * sums.error(biased))
            for name, biased in (("cmmd", True), ("cmmd/unbiased", False))
        }
        return measured(self.values, numbers, inputs.extractor.name)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one, float64; a row of zeros stays one."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1 for rows (n, dim) and (m, dim).

    The constant cancels in both estimates. Without it digits are kept: the kernel of unit vectors is between
    0.98 and 1.
    """
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T)
    return np.expm1(-np.maximum(squared, 0) / (2 * SIGMA**2))
