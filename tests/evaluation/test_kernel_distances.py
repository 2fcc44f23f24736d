"""KID and CMMD against sums over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import given, rows

from evaluation.folds import FOLDS, fold_of
from evaluation.metrics import mmd
from evaluation.metrics.cmmd import ClipMMD
from evaluation.metrics.kid import KernelDistance, by_subsets, polynomial
from evaluation.values import flat


def mmd_by_pairs(x, y, kernel, biased: bool) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)

    def mean(a, b, same: bool) -> float:
        values = [
            kernel(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if biased or not same or i != j
        ]
        return float(np.mean(values))

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_is_the_u_statistic_over_all_pairs(block: int) -> None:
    x, y = rows(43), rows(31, seed=1, shift=0.3)
    truth = mmd_by_pairs(x, y, lambda a, b: (a @ b / 7 + 1) ** 3, biased=False)
    found = flat(KernelDistance().compute(given(x, y)))
    assert found["kid:tiny"] == pytest.approx(truth, rel=1e-12)
    assert found["kid:tiny/subset_size"] == 31 and found["kid:tiny/se"] > 0


def test_kid_error_is_the_jackknife_over_folds(block: int) -> None:
    x, y = rows(43), rows(31, seed=1, shift=0.3)
    fold = fold_of(np.arange(43))
    left = np.array([mmd.Sums.of(x[fold != k], y, polynomial).squared(False) for k in range(FOLDS)])
    truth = np.sqrt(0.9 * ((left - left.mean()) ** 2).sum())
    assert flat(KernelDistance().compute(given(x, y)))["kid:tiny/se"] == pytest.approx(truth, rel=1e-10)


def test_kid_is_unbiased_and_its_error_honest() -> None:
    values, errors = [], []
    y = rows(600, seed=999)
    for seed in range(60):
        sums = mmd.Sums.of(rows(120, seed=seed), y, polynomial)
        values.append(sums.squared(False))
        errors.append(sums.error(False))
    # One reference for all draws.
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5 + 0.004
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_kid_subsets_are_torch_fidelitys() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = rows(120), rows(90, seed=1, shift=0.2)
    theirs = metric.kid_features_to_metric(
        torch.from_numpy(x.astype(np.float64)), torch.from_numpy(y.astype(np.float64)),
        kid_subsets=9, kid_subset_size=50, verbose=False,
    )  # fmt: skip
    mean, spread = by_subsets(x, y, 9, 50)
    assert mean == pytest.approx(theirs[metric.KEY_METRIC_KID_MEAN], rel=1e-10)
    assert spread == pytest.approx(theirs[metric.KEY_METRIC_KID_STD], rel=1e-10)


def test_kid_of_whole_sets_as_one_subset_is_the_full_one() -> None:
    x, y = rows(40), rows(40, seed=1, shift=0.2)
    mean, spread = by_subsets(x, y, 3, 40)
    assert mean == pytest.approx(mmd.Sums.of(x, y, polynomial).squared(False), rel=1e-12)
    assert spread == pytest.approx(0, abs=1e-15)


def test_cmmd_is_a_thousand_times_mmd_of_unit_vectors(block: int) -> None:
    x, y = rows(33), rows(29, seed=1, shift=0.3)
    units = [
        z.astype(np.float64) / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True) for z in (x, y)
    ]

    def kernel(a, b) -> float:
        return np.exp(-((a - b) ** 2).sum() / 200)

    found = flat(ClipMMD().compute(given(x, y)))
    for name, biased in (("cmmd:tiny", True), ("cmmd:tiny/unbiased", False)):
        assert found[name] == pytest.approx(1000 * mmd_by_pairs(*units, kernel, biased), rel=1e-9)
        assert found[f"{name}/se"] > 0
    assert flat(ClipMMD().compute(given(x, x)))["cmmd:tiny"] == pytest.approx(0, abs=1e-12)
