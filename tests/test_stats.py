"""Statistics and Fréchet distance against closed forms, NumPy and the definition."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.stats import (
    FeatureStats,
    FoldedStats,
    Source,
    fold_of,
    frechet_distance,
    frechet_ratio_with_error,
    frechet_with_error,
)
from stepdistill.errors import UserError


def stats_of(rows: np.ndarray, batch: int | None = None, source: Source | None = None) -> FeatureStats:
    stats = FeatureStats(rows.shape[1], source)
    for start in range(0, len(rows), batch or max(len(rows), 1)):
        stats.add(rows[start : start + (batch or len(rows))])
    return stats


def folded(rows: np.ndarray, batch: int | None = None) -> FoldedStats:
    stats = FoldedStats(rows.shape[1])
    for start in range(0, len(rows), batch or len(rows)):
        stats.add(rows[start : start + (batch or len(rows))])
    return stats


def exactly(mean: np.ndarray, cov: np.ndarray, n: int = 1000) -> FeatureStats:
    """Statistics with exactly these moments, from whitened and coloured rows."""
    rows = np.random.default_rng(len(mean)).standard_normal((n, len(mean)))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T).reshape(len(mean), -1))).T
    return stats_of(rows @ np.linalg.cholesky(cov).T + mean)


def correlated(rng: np.random.Generator, n: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """Rows whose spectrum falls like that of a network's features."""
    mix = np.linalg.qr(np.random.default_rng(5).standard_normal((dim, dim)))[0] * (
        np.arange(1, dim + 1) ** -0.7
    )
    return rng.standard_normal((n, dim)) @ mix.T + shift


def nuclear_truth(x: np.ndarray, y: np.ndarray) -> float:
    """The definition with the centred features themselves as factors: no covariance and no root of one."""
    fx, fy = (z - z.mean(0) for z in (x, y))
    fx, fy = fx / np.sqrt(len(x) - 1), fy / np.sqrt(len(y) - 1)
    norm = np.linalg.svd(fx @ fy.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (fx**2).sum() + (fy**2).sum() - 2 * norm


def test_one_dimension_is_difference_of_means_and_deviations() -> None:
    a, b = exactly(np.array([1.0]), np.array([[4.0]])), exactly(np.array([-2.0]), np.array([[0.25]]))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 0.5) ** 2, abs=1e-9)


def test_diagonal_gaussians() -> None:
    rng = np.random.default_rng(0)
    mean_a, mean_b, dev_a, dev_b = rng.standard_normal((4, 12))
    a, b = exactly(mean_a, np.diag(dev_a**2)), exactly(mean_b, np.diag(dev_b**2))
    truth = ((mean_a - mean_b) ** 2).sum() + ((abs(dev_a) - abs(dev_b)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(truth, abs=1e-9)


def test_commuting_covariances() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    a, b = rng.uniform(0.01, 4, (2, 9))
    mean = np.zeros(9)
    found = frechet_distance(exactly(mean, basis * a @ basis.T), exactly(mean, basis * b @ basis.T))
    assert found == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-9)


def test_agrees_with_scipy_when_there_are_enough_samples() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(2)
    x, y = correlated(rng, 900, 64), correlated(rng, 800, 64, 0.1)
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    truth = (
        ((x.mean(0) - y.mean(0)) ** 2).sum()
        + np.trace(np.cov(x.T))
        + np.trace(np.cov(y.T))
        - 2 * np.trace(root)
    )
    assert frechet_distance(stats_of(x), stats_of(y)) == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "dim"),
    [
        (40, 40, 128),
        (40, 900, 128),
        (900, 40, 128),
        (2, 2, 16),
        (129, 130, 128),
        (200, 200, 400),
        (900, 800, 128),
    ],
)
def test_definition_holds_for_few_and_for_many_samples(n: int, m: int, dim: int) -> None:
    rng = np.random.default_rng(n + m)
    x, y = correlated(rng, n, dim), correlated(rng, m, dim, 0.05)
    assert frechet_distance(stats_of(x), stats_of(y)) == pytest.approx(nuclear_truth(x, y), abs=1e-9)


def test_dead_and_duplicate_features() -> None:
    rng = np.random.default_rng(3)
    x, y = correlated(rng, 500, 30), correlated(rng, 400, 30, 0.2)
    x, y = (np.hstack([z, z[:, :5], np.zeros((len(z), 5))]) for z in (x, y))
    assert frechet_distance(stats_of(x), stats_of(y)) == pytest.approx(nuclear_truth(x, y), abs=1e-9)


@pytest.mark.parametrize("n", [30, 2000])
def test_distance_to_itself(n: int) -> None:
    x = 10 * correlated(np.random.default_rng(4), n, 100)
    assert 0 <= frechet_distance(stats_of(x), stats_of(x)) < 1e-8


def test_constant_features_have_no_spread() -> None:
    assert frechet_distance(stats_of(np.ones((5, 3))), stats_of(np.full((4, 3), 3.0))) == pytest.approx(12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_equals_numpy(offset: float) -> None:
    x = np.random.default_rng(6).standard_normal((1234, 7)) + offset
    stats = stats_of(x, 101)
    # Rows at 1e6 themselves have a resolution of 1e-10; the centred truth removes that from the comparison.
    assert stats.n == 1234
    np.testing.assert_allclose(stats.mean, offset + (x - offset).mean(0), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(stats.cov, np.cov((x - offset).T), rtol=0, atol=1e-12)


def test_merge_in_any_order_and_with_nothing() -> None:
    x = np.random.default_rng(7).standard_normal((700, 6))
    parts = [stats_of(part) for part in (x[:3], x[3:400], x[400:])]
    forward, backward = FeatureStats(6), FeatureStats(6)
    for part in parts:
        forward.merge(part)
    for part in reversed(parts):
        backward.merge(part)
    forward.merge(FeatureStats(6))
    for merged in (forward, backward):
        np.testing.assert_allclose(merged.cov, np.cov(x.T), atol=1e-14)
        np.testing.assert_allclose(merged.mean, x.mean(0), atol=1e-15)


@pytest.mark.parametrize("batch", [1, 7, 64, 250, 999])
def test_bits_do_not_depend_on_the_batch_size(batch: int) -> None:
    x = np.random.default_rng(8).standard_normal((611, 33)).astype(np.float32)
    reference = stats_of(x[::-1].copy())
    whole, parts = stats_of(x), stats_of(x, batch)
    assert np.array_equal(whole.cov, parts.cov) and np.array_equal(whole.mean, parts.mean)
    assert frechet_with_error(folded(x), reference) == frechet_with_error(folded(x, batch), reference)


def test_reading_does_not_change_the_state() -> None:
    x = np.random.default_rng(9).standard_normal((300, 4))
    watched = FeatureStats(4)
    for row in x:
        watched.add(row[None])
        _ = watched.mean
    assert np.array_equal(watched.cov, stats_of(x).cov)


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


def test_save_and_load_keep_every_bit(tmp_path) -> None:
    source = Source("scenes-v1", "ab" * 32, "none")
    stats = stats_of(np.random.default_rng(2).standard_normal((300, 5)), source=source)
    again = FeatureStats.load(stats.save(tmp_path / "a.npz"), expect=source)
    assert again.n == 300 and again.source == source
    assert np.array_equal(again.mean, stats.mean) and np.array_equal(again.cov, stats.cov)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_statistics_of_another_extractor_are_refused(tmp_path) -> None:
    path = stats_of(np.eye(4), source=Source("scenes-v1", "a")).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="extractor 'scenes-v1', but 'other'"):
        FeatureStats.load(path, expect=Source("other", "a"))
    with pytest.raises(UserError, match="sha256"):
        FeatureStats.load(path, expect=Source("scenes-v1", "b"))
    with pytest.raises(UserError, match="sha256"):
        frechet_distance(FeatureStats.load(path), stats_of(np.eye(4), source=Source("scenes-v1", "b")))


def test_files_that_are_no_statistics(tmp_path) -> None:
    with pytest.raises(UserError, match="no statistics file at"):
        FeatureStats.load(tmp_path / "missing.npz")
    text = tmp_path / "text.npz"
    text.write_text("hello")
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, mu=np.array([{"a": 1}], dtype=object), m2=np.eye(1), n=3, meta="{}")
    other = tmp_path / "other.npz"
    np.savez(other, mu=np.zeros(3), sigma=np.eye(3))
    for path in (text, pickled, other):
        with pytest.raises(UserError, match="not a statistics file of ours"):
            FeatureStats.load(path)


def test_wrong_features() -> None:
    x = np.random.default_rng(3).standard_normal((10, 4))
    with pytest.raises(UserError, match=r"\(N, 4\), got \(2, 5\)"):
        FeatureStats(4).add(np.zeros((2, 5)))
    with pytest.raises(UserError, match=r"image 3 .* NaN or infinite"):
        FeatureStats(4).add(np.where(np.arange(10)[:, None] == 3, np.nan, x))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(stats_of(x), stats_of(x[:1]))
    with pytest.raises(UserError, match="cannot be compared"):
        frechet_distance(stats_of(x), stats_of(x[:, :3]))
    with pytest.raises(UserError, match="same samples"):
        frechet_ratio_with_error(folded(x), folded(x[:9]), stats_of(x))
