"""Inception score, diversity, and a student beside its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import given, rows

from evaluation.extractors import Extractor
from evaluation.folds import FOLDS, fold_of
from evaluation.frechet import frechet_distance
from evaluation.images import MemoryImages
from evaluation.metrics.base import Inputs
from evaluation.metrics.cmmd import unit
from evaluation.metrics.diversity import Diversity
from evaluation.metrics.inception_score import InceptionScore, split_scores
from evaluation.metrics.paired import Paired
from evaluation.stats import FeatureStats
from evaluation.values import flat
from stepdistill.errors import UserError


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
        flat(InceptionScore().compute(inputs))
    object.__setattr__(inputs.extractor, "head", lambda features: features)
    found = flat(InceptionScore().compute(inputs))
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


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    x = rows(9)
    # c has one image and does not count.
    groups = ["a", "b", "a", "c", "b", "a", "d", "d", "d"]
    found = flat(Diversity().compute(given(x, groups=groups)))
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
    both = flat(Diversity().compute(given(prompt + noise, groups=groups)))
    assert both["diversity:tiny/share"] == pytest.approx(0.5, abs=0.08)
    assert flat(Diversity().compute(given(prompt, groups=groups)))["diversity:tiny"] == 0
    ignoring = flat(Diversity().compute(given(noise, groups=groups)))
    assert ignoring["diversity:tiny/share"] == pytest.approx(1, abs=0.05)
    half = given(prompt + noise / 2, groups=groups, teacher=prompt + noise)
    found = flat(Diversity().compute(half))
    assert found["diversity:tiny/of_teacher"] == pytest.approx(0.5, rel=1e-5)
    assert found["diversity:tiny/of_teacher/se"] == pytest.approx(0, abs=1e-6)
    captions = given(prompt + noise, captions=[f"p{i // 8}" for i in range(400)])
    assert flat(Diversity().compute(captions)) == both


def test_a_teacher_without_diversity_is_said_and_gives_no_ratio() -> None:
    inputs = given(rows(8), groups=[0, 0, 1, 1, 2, 2, 3, 3], teacher=rows(4).repeat(2, 0))
    found = flat(Diversity().compute(inputs))
    assert found["diversity:tiny"] > 0 and not any("of_teacher" in name for name in found)
    assert "one image per prompt" in inputs.doubts[0]


def test_diversity_needs_prompts_with_several_images() -> None:
    with pytest.raises(UserError, match="every prompt here has one"):
        flat(Diversity().compute(given(rows(4), groups=range(4))))
    with pytest.raises(UserError, match="prompt of each of the 4 images, got 3"):
        flat(Diversity().compute(given(rows(4), captions=["a"] * 3)))
    with pytest.raises(UserError, match="got none"):
        flat(Diversity().compute(given(rows(4))))


def test_paired_is_zero_for_the_teacher_and_one_for_strangers() -> None:
    teacher = rows(400)
    same = flat(Paired().compute(given(teacher, teacher=teacher)))
    assert same["paired:tiny/distance"] == 0 and same["paired:tiny/cosine"] == pytest.approx(1)
    assert same["paired:tiny/fd"] == pytest.approx(0, abs=1e-10)
    strangers = flat(Paired().compute(given(rows(400, seed=5), teacher=teacher)))
    assert strangers["paired:tiny/distance"] == pytest.approx(1, abs=0.1)
    assert abs(strangers["paired:tiny/cosine"]) < 0.1
    near = flat(Paired().compute(given(teacher + 0.5 * rows(400, seed=5), teacher=teacher)))
    assert near["paired:tiny/distance"] == pytest.approx(0.125, rel=0.1)
    assert near["paired:tiny/fd/se"] > 0 and 0 < near["paired:tiny/distance/se"] < 0.02


def test_paired_is_its_definition() -> None:
    x, t = rows(30).astype(np.float64), rows(30, seed=1).astype(np.float64)
    found = flat(Paired().compute(given(rows(30), teacher=rows(30, seed=1))))
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
        flat(Paired().compute(inputs))


def test_unit_leaves_zero_rows() -> None:
    assert np.array_equal(unit(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]])
