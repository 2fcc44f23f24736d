"""Statistics and Fréchet distance against closed forms, NumPy and the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from features import correlated, exactly, folded, frechet_with_error, nuclear_truth, stats_of

from evaluation.folds import frechet_ratio_with_error
from evaluation.frechet import frechet_distance, frechet_from_features
from evaluation.stats import FeatureStats, Source
from stepdistill.errors import UserError


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


def test_merging_few_rows_is_adding_them_bit_for_bit() -> None:
    x = correlated(np.random.default_rng(10), 400, 300)
    parts = stats_of(x[:100]).merge(stats_of(x[100:290]))
    assert parts.n == 290 and np.array_equal(parts.cov, stats_of(x[:290]).cov)
    other = stats_of(x[110:])
    assert frechet_distance(parts, other) == frechet_distance(stats_of(x[:290]), other)
    parts.merge(stats_of(x[290:]))
    assert parts.n == 400
    np.testing.assert_allclose(parts.cov, np.cov(x.T), atol=1e-13)


def test_few_rows_are_saved_with_every_bit(tmp_path) -> None:
    x, y = (correlated(np.random.default_rng(s), 90, 128) for s in (1, 2))
    stats = stats_of(x)
    again = FeatureStats.load(stats.save(tmp_path / "a.npz"))
    assert again.n == 90 and frechet_distance(again, stats_of(y)) == frechet_distance(stats, stats_of(y))
    assert np.array_equal(again.add(y).cov, stats.add(y).cov)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 90), (200, 30), (129, 128)])
def test_from_features(n: int, m: int) -> None:
    x, y = correlated(np.random.default_rng(n), n, 128), correlated(np.random.default_rng(m + 1), m, 128, 0.1)
    assert frechet_from_features(x, y) == pytest.approx(nuclear_truth(x, y), rel=1e-9)
    assert frechet_from_features(y, x) == pytest.approx(nuclear_truth(x, y), rel=1e-9)


def test_duplicates_among_few_rows_and_rows_far_from_zero() -> None:
    x, y = correlated(np.random.default_rng(1), 60, 128), correlated(np.random.default_rng(2), 50, 128, 0.1)
    twice = np.concatenate([x, x[:30]])
    assert frechet_from_features(twice, y) == pytest.approx(nuclear_truth(twice, y), rel=1e-9)
    moved = frechet_from_features(x + 2.0**20, y + 2.0**20)
    assert moved == pytest.approx(
        frechet_from_features(x + 2.0**20 - 2.0**20, y + 2.0**20 - 2.0**20), rel=1e-9
    )


@pytest.mark.parametrize("n", [400, 30])
def test_spectra_too_steep_for_eigenvalues_of_a_product(n: int) -> None:
    """Roots of eigenvalues that are round-off would be wrong by 1e-8 each; singular values are not."""
    spread = np.where(np.arange(40) < 20, 1, 4e-7)
    x, y = (np.random.default_rng(s).standard_normal((n, 40)) * spread for s in (1, 2))
    assert frechet_from_features(x, y) == pytest.approx(nuclear_truth(x, y), rel=1e-9)
    assert frechet_from_features(x, x) < 1e-8


INCEPTION = Source("inception-2015", "c" * 64, "TF1")


def foreign(path, **arrays):
    x = correlated(np.random.default_rng(8), 300, 12)
    np.savez(path, mu=x.mean(0), sigma=np.cov(x.T), **arrays)
    return x


@pytest.mark.parametrize(
    "others",
    [
        # EDM, pytorch-fid, clean-fid.
        {},
        # ADM.
        {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)},
        {"num_images": np.array(300)},
    ],
)
def test_layouts_of_others_load(tmp_path, others) -> None:
    x = foreign(tmp_path / "edm.npz", **others)
    y = correlated(np.random.default_rng(9), 200, 12, 0.1)
    stats = FeatureStats.load(tmp_path / "edm.npz", expect=INCEPTION)
    assert stats.n == (300 if "num_images" in others else 0)
    assert frechet_distance(stats_of(y, source=INCEPTION), stats) == pytest.approx(
        nuclear_truth(x, y), rel=1e-9
    )
    again = FeatureStats.load(stats.save(tmp_path / "again.npz"), expect=INCEPTION)
    assert again.n == stats.n
    np.testing.assert_allclose(again.cov, stats.cov, rtol=1e-15)


def test_foreign_files_belong_to_inception_alone(tmp_path) -> None:
    foreign(tmp_path / "edm.npz")
    for expect in (None, Source("scenes-v1", "a")):
        with pytest.raises(UserError, match="does not say what made"):
            FeatureStats.load(tmp_path / "edm.npz", expect=expect)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match="don't fit"):
        FeatureStats.load(tmp_path / "bad.npz", expect=INCEPTION)
    np.savez(tmp_path / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(UserError, match="NaN"):
        FeatureStats.load(tmp_path / "nan.npz", expect=INCEPTION)
    stats = FeatureStats.load(tmp_path / "edm.npz", expect=INCEPTION)
    with pytest.raises(UserError, match="cannot be merged"):
        stats.merge(FeatureStats(12, INCEPTION))


@pytest.mark.parametrize("name", ["ref.pkl", "ref.pt", "ref.PICKLE"])
def test_pickled_references_are_refused(tmp_path, name: str) -> None:
    import pickle

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="is a pickle"):
        FeatureStats.load(tmp_path / name, expect=INCEPTION)
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a statistics file of ours"):
        FeatureStats.load(tmp_path / "renamed.npz", expect=INCEPTION)


def test_another_resize_is_refused(tmp_path) -> None:
    path = stats_of(np.eye(4), source=INCEPTION).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="resize 'TF1', but 'bicubic'"):
        FeatureStats.load(path, expect=Source("inception-2015", "c" * 64, "bicubic"))


def test_agrees_with_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.image.fid")
    x, y = correlated(np.random.default_rng(1), 300, 64), correlated(np.random.default_rng(2), 200, 64, 0.1)
    moments = [torch.from_numpy(part) for z in (x, y) for part in (z.mean(0), np.cov(z.T))]
    assert frechet_from_features(x, y) == pytest.approx(float(theirs._compute_fid(*moments)), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (40, 30)])
def test_agrees_with_torch_fidelity(n: int, m: int) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = correlated(np.random.default_rng(1), n, 64), correlated(np.random.default_rng(2), m, 64, 0.1)
    theirs = [{"mu": z.mean(0), "sigma": np.cov(z.T)} for z in (x, y)]
    found = metric.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    # With fewer samples than features their formula has an error of 1e-6 and more.
    rel = 1e-9 if n > 64 else 1e-4
    assert frechet_from_features(x, y) == pytest.approx(found, rel=rel)
