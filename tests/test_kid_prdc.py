"""Metrics on rows of features against their definitions in float64, written out with no blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.extractors import Extractor
from evaluation.folds import FOLDS, fold_of
from evaluation.frechet import frechet_distance
from evaluation.images import MemoryImages
from evaluation.metrics import METRICS, base, get_metrics, mmd, prdc
from evaluation.metrics.base import Inputs
from evaluation.metrics.cmmd import ClipMMD, unit
from evaluation.metrics.diversity import Diversity
from evaluation.metrics.fd import FID, FrechetDistance
from evaluation.metrics.inception_score import InceptionScore, split_scores
from evaluation.metrics.kid import KernelDistance, by_subsets, polynomial
from evaluation.metrics.paired import Paired
from evaluation.metrics.patch_fd import PatchDistance, of_patches
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError


def rows(n: int, dim: int = 7, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32) + np.float32(shift)


def given(x: np.ndarray, y: np.ndarray | None = None, teacher: np.ndarray | None = None, **fields) -> Inputs:
    """Inputs whose images are stand-ins: their features are those given."""
    extractor = Extractor("tiny", x.shape[1], "0" * 64, lambda images: images)
    inputs = Inputs(MemoryImages([blank(len(x))]), extractor=extractor, **fields)
    inputs.__dict__["features"] = x
    if y is not None:
        inputs.__dict__["reference_features"] = y
    if teacher is not None:
        inputs.teacher, inputs.__dict__["teacher_features"] = MemoryImages([blank(len(teacher))]), teacher
    return inputs


def blank(n: int) -> Tensor:
    return torch.zeros(n, 3, 1, 1, dtype=torch.uint8)


@pytest.fixture(params=[1000, 7])
def block(request, monkeypatch) -> int:
    """Blocks larger than all sets, and blocks which divide nothing."""
    for module in (mmd, prdc):
        monkeypatch.setattr(module, "_BLOCK", request.param)
    return request.param


# -------------------------------------------------------------------------------- MMD


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
    found = KernelDistance().compute(given(x, y))
    assert found["kid:tiny"] == pytest.approx(truth, rel=1e-12)
    assert found["kid:tiny/subset_size"] == 31 and found["kid:tiny/se"] > 0


def test_kid_error_is_the_jackknife_over_folds(block: int) -> None:
    x, y = rows(43), rows(31, seed=1, shift=0.3)
    fold = fold_of(np.arange(43))
    left = np.array([mmd.Sums.of(x[fold != k], y, polynomial).squared(False) for k in range(FOLDS)])
    truth = np.sqrt(0.9 * ((left - left.mean()) ** 2).sum())
    assert KernelDistance().compute(given(x, y))["kid:tiny/se"] == pytest.approx(truth, rel=1e-10)


def test_kid_is_unbiased_and_its_error_honest() -> None:
    values, errors = [], []
    y = rows(600, seed=999)
    for seed in range(60):
        sums = mmd.Sums.of(rows(120, seed=seed), y, polynomial)
        values.append(sums.squared(False))
        errors.append(sums.error(False))
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5 + 0.004  # one reference for all draws
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

    found = ClipMMD().compute(given(x, y))
    for name, biased in (("cmmd:tiny", True), ("cmmd:tiny/unbiased", False)):
        assert found[name] == pytest.approx(1000 * mmd_by_pairs(*units, kernel, biased), rel=1e-9)
        assert found[f"{name}/se"] > 0
    assert ClipMMD().compute(given(x, x))["cmmd:tiny"] == pytest.approx(0, abs=1e-12)


# -------------------------------------------------------------------------------- precision and recall


def prdc_by_pairs(x, y, k: int, k_wide: int) -> dict[str, float]:
    x, y = x.astype(np.float64), y.astype(np.float64)

    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(2)

    real, real_wide = (np.sort(distances(y, y), 1)[:, i] for i in (k, k_wide))
    sample = np.sort(distances(x, x), 1)[:, k]
    cross = distances(x, y)
    return {
        "precision": (cross <= real).any(1).mean(),
        "recall": (cross <= sample[:, None]).any(0).mean(),
        "density": (cross <= real_wide).sum(1).mean() / k_wide,
        "coverage": (cross <= real_wide).any(0).mean(),
    }


def lattice(n: int, seed: int) -> np.ndarray:
    """Points with many exact ties and duplicates, far from zero."""
    return np.random.default_rng(seed).integers(0, 3, (n, 4)).astype(np.float32) + 1000


def two_clusters(seed: int) -> np.ndarray:
    """So narrow and so far apart that the round-off of matrix products puts neighbours in a wrong order."""
    return 1e-4 * rows(60, 4, seed).astype(np.float64) + np.where(np.arange(60) % 2, 1e4, -1e4)[:, None]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (rows(90), rows(70, seed=1, shift=0.5)),
        (rows(60), rows(60)),
        (lattice(80, 1), lattice(60, 2)),
        (lattice(25, 1)[:, :1], lattice(40, 2)[:, :1]),  # nearly all are duplicates
        (rows(8), rows(6, seed=1)),
        (rows(40) * 1e-3 + 1e4, rows(50, seed=1) * 1e-3 + 1e4),
        (two_clusters(1), two_clusters(2)),
    ],
)
def test_prdc_decides_as_all_pairs_do(x, y, block: int) -> None:
    found = prdc.prdc(x, y)
    truth = prdc_by_pairs(x, y, 3, 5)
    assert {name: found[name] for name in truth} == {
        name: pytest.approx(value) for name, value in truth.items()
    }


def test_prdc_of_real_vectors_that_are_not_float32() -> None:
    """0.1 has no exact square: only a comparison of differences finds the tie."""
    x = np.array([[0.1 * i, 0.3] for i in range(20)])
    y = np.array([[0.1 * i + 0.1, 0.3] for i in range(20)])
    truth = prdc_by_pairs(x, y, 3, 5)
    found = prdc.prdc(x, y)
    mean = y.mean(0)  # centring rounds, so the truth is that of centred points
    centred = prdc_by_pairs(x - mean, y - mean, 3, 5)
    assert {name: found[name] for name in truth} == {name: pytest.approx(v) for name, v in centred.items()}


def test_prdc_agrees_with_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = rows(150), rows(130, seed=1, shift=0.4)
    precision, recall = metric.calculate_precision_recall_part(
        torch.from_numpy(x).double(), torch.from_numpy(y).double(), neighborhood=3, batch_size=64
    )
    found = prdc.prdc(x, y)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), abs=1e-6)


def test_recall_falls_on_mode_drop_while_precision_stays() -> None:
    centres = 20 * np.eye(6, dtype=np.float32)

    def modes(count: int, n: int, seed: int) -> np.ndarray:
        return rows(n, 6, seed) + centres[np.arange(n) % count]

    real = modes(6, 240, 1)
    found = [prdc.prdc(modes(count, 240, 2), real) for count in (6, 4, 2, 1)]
    recalls, precisions = ([one[name] for one in found] for name in ("recall", "precision"))
    assert recalls == sorted(recalls, reverse=True) and recalls[-1] < 0.3 * recalls[0]
    assert min(precisions) > 0.9 * precisions[0]
    noisy = prdc.prdc(modes(6, 240, 2) + 3 * rows(240, 6, 9), real)
    assert noisy["precision"] < 0.3 * precisions[0] and noisy["recall"] > 0.9 * recalls[0]


def test_prdc_wants_more_images_than_neighbours() -> None:
    with pytest.raises(UserError, match="more than 5 images on each side, got 5"):
        prdc.prdc(rows(5), rows(20))


# -------------------------------------------------------------------------------- Inception score


def scored(logits: np.ndarray, split: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    found = []
    for k in range(FOLDS):
        part = p[split == k]
        found.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.array(found)


def test_inception_score_is_its_definition() -> None:
    logits = 3 * rows(203, 11).astype(np.float64)
    truth = scored(logits, fold_of(np.arange(203)))
    np.testing.assert_allclose(split_scores(np.split(logits, [7, 100])), truth, rtol=1e-12)
    inputs = given(logits.astype(np.float64))
    with pytest.raises(UserError, match="needs a classifier"):
        InceptionScore().compute(inputs)
    object.__setattr__(inputs.extractor, "head", lambda features: features)
    found = InceptionScore().compute(inputs)
    assert found["is:tiny"] == pytest.approx(truth.mean(), rel=1e-12)
    assert found["is:tiny/se"] == pytest.approx(truth.std(ddof=1) / 10**0.5, rel=1e-12)


def test_inception_score_bounds() -> None:
    sure = 1000.0 * np.eye(4)[np.arange(400) % 4]
    np.testing.assert_allclose(split_scores([np.zeros((50, 8))]), 1, rtol=1e-12)
    assert split_scores([sure], np.arange(400) // 4 % FOLDS) == pytest.approx(4)
    with pytest.raises(UserError, match="at least 10 images, got 6"):
        split_scores([np.zeros((6, 8))])


def test_inception_score_agrees_with_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 2 * rows(200, 9)
    theirs = metric.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020)
    split = np.empty(200, int)
    split[np.random.RandomState(2020).permutation(200)] = np.arange(200) // 20
    found = split_scores([logits], split)
    assert found.mean() == pytest.approx(theirs[metric.KEY_METRIC_ISC_MEAN], rel=1e-10)
    assert found.std() == pytest.approx(theirs[metric.KEY_METRIC_ISC_STD], rel=1e-8)


# -------------------------------------------------------------------------------- prompts and teachers


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    x = rows(9)
    groups = ["a", "b", "a", "c", "b", "a", "d", "d", "d"]  # c has one image and does not count
    found = Diversity().compute(given(x, groups=groups))
    per_prompt = []
    for name in "abd":
        own = [x[i].astype(np.float64) for i, group in enumerate(groups) if group == name]
        pairs = [np.linalg.norm(p - q) for i, p in enumerate(own) for q in own[i + 1 :]]
        per_prompt.append(np.mean(pairs))
    assert found["diversity:tiny"] == pytest.approx(np.mean(per_prompt), rel=1e-12)
    assert found["diversity:tiny/se"] == pytest.approx(np.std(per_prompt, ddof=1) / 3**0.5, rel=1e-12)


def test_diversity_tells_collapse_from_variety() -> None:
    prompt, noise = rows(50, seed=1).repeat(8, 0), rows(400, seed=2)
    groups = [i // 8 for i in range(400)]
    both = Diversity().compute(given(prompt + noise, groups=groups))
    assert both["diversity:tiny/share"] == pytest.approx(0.5, abs=0.08)
    assert Diversity().compute(given(prompt, groups=groups))["diversity:tiny"] == 0
    ignoring = Diversity().compute(given(noise, groups=groups))
    assert ignoring["diversity:tiny/share"] == pytest.approx(1, abs=0.05)
    half = given(prompt + noise / 2, groups=groups, teacher=prompt + noise)
    found = Diversity().compute(half)
    assert found["diversity:tiny/of_teacher"] == pytest.approx(0.5, rel=1e-5)
    assert found["diversity:tiny/of_teacher/se"] == pytest.approx(0, abs=1e-6)
    captions = given(prompt + noise, captions=[f"p{i // 8}" for i in range(400)])
    assert Diversity().compute(captions) == both


def test_diversity_needs_prompts_with_several_images() -> None:
    with pytest.raises(UserError, match="every prompt here has one"):
        Diversity().compute(given(rows(4), groups=range(4)))
    with pytest.raises(UserError, match="prompt of each of the 4 images, got 3"):
        Diversity().compute(given(rows(4), captions=["a"] * 3))
    with pytest.raises(UserError, match="got none"):
        Diversity().compute(given(rows(4)))


def test_paired_is_zero_for_the_teacher_and_one_for_strangers() -> None:
    teacher = rows(400)
    same = Paired().compute(given(teacher, teacher=teacher))
    assert same["paired:tiny/distance"] == 0 and same["paired:tiny/cosine"] == pytest.approx(1)
    assert same["paired:tiny/fd"] == pytest.approx(0, abs=1e-10)
    strangers = Paired().compute(given(rows(400, seed=5), teacher=teacher))
    assert strangers["paired:tiny/distance"] == pytest.approx(1, abs=0.1)
    assert abs(strangers["paired:tiny/cosine"]) < 0.1
    near = Paired().compute(given(teacher + 0.5 * rows(400, seed=5), teacher=teacher))
    assert near["paired:tiny/distance"] == pytest.approx(0.125, rel=0.1)
    assert near["paired:tiny/fd/se"] > 0 and 0 < near["paired:tiny/distance/se"] < 0.02


def test_paired_is_its_definition() -> None:
    x, t = rows(30).astype(np.float64), rows(30, seed=1).astype(np.float64)
    found = Paired().compute(given(rows(30), teacher=rows(30, seed=1)))
    unrelated = np.mean([((t[i] - t[j]) ** 2).sum() for i in range(30) for j in range(30) if i != j])
    pairs = ((x - t) ** 2).sum(1) / unrelated
    assert found["paired:tiny/distance"] == pytest.approx(pairs.mean(), rel=1e-12)
    assert found["paired:tiny/distance/se"] == pytest.approx(pairs.std(ddof=1) / 30**0.5, rel=1e-12)
    cosine = [x[i] @ t[i] / np.linalg.norm(x[i]) / np.linalg.norm(t[i]) for i in range(30)]
    assert found["paired:tiny/cosine"] == pytest.approx(np.mean(cosine), rel=1e-12)
    stats = [FeatureStats(7).add(z) for z in (x, t)]
    assert found["paired:tiny/fd"] == pytest.approx(frechet_distance(*stats), rel=1e-9)


def test_a_teacher_with_fewer_samples_is_refused() -> None:
    extractor = Extractor("mean", 3, "0", lambda images: images.float().mean((2, 3)))
    images = torch.randint(0, 255, (6, 3, 4, 4), dtype=torch.uint8)
    inputs = Inputs(MemoryImages([images]), extractor=extractor, teacher=MemoryImages([images[:5]]))
    with pytest.raises(UserError, match="got 5 for 6"):
        Paired().compute(inputs)


def test_unit_leaves_zero_rows() -> None:
    assert np.array_equal(unit(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]])


# -------------------------------------------------------------------------------- inputs


def pixel_extractor(side: int | None = None) -> Extractor:
    return Extractor("mean", 3, "0", lambda images: images.float().mean((2, 3)), chunk=4, side=side)


def test_patches_are_the_centre_at_full_resolution() -> None:
    images = torch.randint(0, 255, (40, 3, 9, 11), dtype=torch.uint8)
    extractor = pixel_extractor(side=4)
    want = images[:, :, 2:6, 3:7].float().mean((2, 3))
    assert torch.equal(of_patches(extractor)(images), want)
    assert of_patches(extractor).source != extractor.source
    other = torch.randint(0, 255, (30, 3, 9, 11), dtype=torch.uint8)
    inputs = Inputs(MemoryImages([images]), extractor=extractor, reference_images=MemoryImages([other]))
    stats = [FeatureStats(3).add(z[:, :, 2:6, 3:7].float().mean((2, 3))) for z in (images, other)]
    found = PatchDistance().compute(inputs)
    assert found["patch-fd:mean"] == pytest.approx(frechet_distance(*stats), rel=1e-9)
    kept = FeatureStats(3, of_patches(extractor).source).add(other[:, :, 2:6, 3:7].float().mean((2, 3)))
    inputs.patch_reference = kept
    assert PatchDistance().compute(inputs) == pytest.approx(found)
    inputs.patch_reference = FeatureStats(3, extractor.source).add(rows(9, 3))
    with pytest.raises(UserError, match="resize"):
        PatchDistance().compute(inputs)


def test_patches_need_larger_images() -> None:
    with pytest.raises(UserError, match="of 4x4 need larger images, got 4x9"):
        of_patches(pixel_extractor(side=4))(torch.zeros(2, 3, 9, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="images of any size"):
        of_patches(pixel_extractor())


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_features_are_kept_once_in_memory_or_on_disk(limit: int, monkeypatch) -> None:
    monkeypatch.setattr(base, "_IN_MEMORY", limit)
    calls = []

    def network(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.float().mean((2, 3))

    images = torch.randint(0, 255, (21, 3, 4, 4), dtype=torch.uint8)
    extractor = Extractor("mean", 3, "0", network, chunk=4)
    reference = FeatureStats(3, extractor.source).add(rows(9, 3))
    inputs = Inputs(MemoryImages(images.split(5)), extractor=extractor, reference=reference, keep=True)
    found = FrechetDistance().compute(inputs)
    assert np.array_equal(inputs.features, images.float().mean((2, 3)))
    assert isinstance(inputs.features, np.memmap) == (limit == 0)
    assert sum(calls) == 24  # one pass of padded chunks
    once_more = Inputs(MemoryImages([images]), extractor=extractor, reference=reference)
    assert FrechetDistance().compute(once_more) == found


def test_features_that_are_no_numbers_are_named() -> None:
    def network(images: Tensor) -> Tensor:
        mean = images.float().mean((2, 3))
        return torch.where(mean == 7, torch.nan, mean)

    images = torch.zeros(13, 3, 2, 2, dtype=torch.uint8)
    images[10] = 7
    extractor = Extractor("mean", 3, "0", network, chunk=4)
    inputs = Inputs(MemoryImages([images]), extractor=extractor, reference=FeatureStats(3, extractor.source))
    with pytest.raises(UserError, match="features of image 10 are NaN"):
        _ = inputs.folds
    with pytest.raises(UserError, match="features of image 10 of the samples are NaN"):
        _ = inputs.features


@pytest.mark.parametrize("count", [0, 1])
def test_no_metric_takes_fewer_than_two_images(count: int) -> None:
    extractor = pixel_extractor()
    images = MemoryImages([torch.zeros(count, 3, 2, 2, dtype=torch.uint8)])
    others = MemoryImages([torch.zeros(9, 3, 2, 2, dtype=torch.uint8)])
    reference = FeatureStats(3, extractor.source).add(rows(9, 3))
    inputs = Inputs(images, ["a"] * count, extractor, reference, reference_images=others, teacher=others)
    object.__setattr__(extractor, "head", lambda features: features)
    for name in ("fd", "kid", "prdc", "cmmd", "is", "diversity", "paired"):
        (metric,) = get_metrics([name], METRICS).values()
        with pytest.raises(UserError, match=rf"(at least 2 images|needs several images).*|got {count}"):
            metric.compute(inputs)


def test_only_inception_makes_a_fid() -> None:
    with pytest.raises(UserError, match="ask for the metric fd"):
        FID().compute(given(rows(9), teacher=None, reference=FeatureStats(7)))
    inputs = given(rows(40))
    object.__setattr__(inputs.extractor, "name", "inception-2015")
    inputs.reference = FeatureStats(7, inputs.extractor.source).add(rows(50, seed=1))
    found = FID().compute(inputs)
    assert found["fid:inception-2015"] == FrechetDistance().compute(inputs)["fd:inception-2015"]
    assert found["fid:inception-2015/infinity"] < found["fid:inception-2015"]


def test_every_metric_of_rows_says_what_it_needs() -> None:
    fields = set(Inputs.__dataclass_fields__)
    for name in METRICS:
        (metric,) = get_metrics([name], METRICS).values()
        assert metric.needs and metric.needs <= fields
