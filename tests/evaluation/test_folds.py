"""Folds: standard errors, ratios, and the distance at infinitely many samples."""

from __future__ import annotations

import numpy as np
import pytest
from features import correlated, folded, frechet_with_error, stats_of

from evaluation.folds import (
    FoldDistances,
    fold_distances,
    fold_of,
    frechet_paired_with_error,
    frechet_ratio_with_error,
)
from evaluation.frechet import frechet_distance
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError


def test_folds_are_of_one_size_and_mix_the_classes() -> None:
    index = np.arange(5000)
    assert (np.bincount(fold_of(index)) == 500).all()
    assert np.array_equal(fold_of(index[777:900]), fold_of(index)[777:900])
    for classes in (2, 3, 7, 10, 20, 100):
        counts = np.bincount((index % classes) * 10 + fold_of(index), minlength=classes * 10)
        chi2 = ((counts - 500 / classes) ** 2 / (500 / classes)).sum()
        assert chi2 < 9 * classes + 5 * np.sqrt(18 * classes), classes


def test_jackknife_matches_the_spread_over_repetitions() -> None:
    reference = stats_of(np.random.default_rng(0).standard_normal((20_000, 6)))
    values, errors = [], []
    for seed in range(60):
        rows = np.random.default_rng(100 + seed).standard_normal((500, 6)) * 1.1 + 0.2
        value, error = frechet_with_error(folded(rows), reference)
        values.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_ratio_error_is_paired() -> None:
    reference = stats_of(np.random.default_rng(0).standard_normal((20_000, 6)))
    ratios, errors, unpaired = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(500 + seed)
        shared = rng.standard_normal((500, 6))
        teacher, student = (
            folded(shared * 1.1 + 0.3),
            folded(shared * 1.1 + 0.33 + 0.05 * rng.standard_normal((500, 6))),
        )
        ratio, error = frechet_ratio_with_error(student, teacher, reference)
        above, above_se = frechet_with_error(student, reference)
        below, below_se = frechet_with_error(teacher, reference)
        assert ratio == above / below
        ratios.append(ratio)
        errors.append(error)
        unpaired.append(ratio * np.hypot(above_se / above, below_se / below))
    assert np.mean(errors) == pytest.approx(np.std(ratios, ddof=1), rel=0.25)
    assert np.mean(errors) < 0.5 * np.mean(unpaired)


def test_too_few_for_an_error_is_nan() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3))
    value, error = frechet_with_error(folded(x), stats_of(x + 1))
    assert value == pytest.approx(3) and np.isnan(error)


def test_leaving_folds_out_is_the_statistics_of_the_others() -> None:
    x = correlated(np.random.default_rng(3), 207, 20)
    fold = fold_of(np.arange(207))
    for k, stats in enumerate(folded(x).left_out()):
        assert stats.n == (fold != k).sum()
        np.testing.assert_allclose(stats.cov, np.cov(x[fold != k].T), atol=1e-13)
    assert folded(x[:2]).left_out() == [] and len(folded(x[:3]).left_out()) == 3


@pytest.mark.parametrize("dim", [8, 64])
def test_infinity_finds_the_distance_of_the_distributions(dim: int) -> None:
    rng = np.random.default_rng(dim)
    a = np.linalg.qr(rng.standard_normal((dim, dim)))[0] * np.arange(1, dim + 1) ** -0.7
    b = 1.1 * a + 0.05 * rng.standard_normal((dim, dim)) * np.arange(1, dim + 1) ** -0.7
    mean, reference = np.full(dim, 0.02), FeatureStats.of_moments(np.zeros(dim), b @ b.T)
    truth = frechet_distance(FeatureStats.of_moments(mean, a @ a.T), reference)
    naive, found, errors = [], [], []
    for seed in range(25):
        rows = np.random.default_rng(seed).standard_normal((6 * dim, dim)) @ a.T + mean
        distances = fold_distances(folded(rows), reference)
        value, error = distances.infinity
        naive.append(distances.value)
        found.append(value)
        errors.append(error)
    bias = np.mean(naive) - truth
    # What is to be removed stands out clearly.
    assert bias > 5 * np.std(naive) / 5
    assert abs(np.mean(found) - truth) < 0.15 * bias + 3 * np.std(found) / 5
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.4)


def test_infinity_is_exact_for_a_bias_of_first_order() -> None:
    sizes = (90, 91, 93)
    found = FoldDistances(2 + 7 / 102, 102, tuple(2 + 7 / size for size in sizes), sizes)
    assert found.infinity == pytest.approx((2, 0), abs=1e-12)


def test_paired_distance_has_the_error_of_pairs() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((500, 6))
    a, c = folded(x + 0.05 * rng.standard_normal(x.shape) + 0.1), folded(x)
    value, error = frechet_paired_with_error(a, c)
    assert value == frechet_distance(a.total, c.total)
    assert 0 < error < 0.3 * frechet_with_error(a, c.total)[1]
    with pytest.raises(UserError, match="same samples"):
        frechet_paired_with_error(a, folded(x[:9]))
