"""What metrics are computed from: patches, kept features, refused sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import given, rows
from torch import Tensor

from evaluation.extractors import Extractor
from evaluation.frechet import frechet_distance
from evaluation.images import MemoryImages
from evaluation.metrics import METRICS, base, get_metrics
from evaluation.metrics.base import Inputs
from evaluation.metrics.fd import FID, FrechetDistance
from evaluation.metrics.patch_fd import PatchDistance, of_patches
from evaluation.stats import FeatureStats
from evaluation.values import flat
from stepdistill.errors import UserError


def pixel_extractor(side: int | None = None) -> Extractor:
    return Extractor("mean", 3, "0", lambda images: images.float().mean((2, 3)), chunk=4, side=side)


def test_patches_are_the_centre_at_full_resolution() -> None:
    images = torch.randint(0, 255, (40, 3, 9, 11), dtype=torch.uint8)
    extractor = pixel_extractor(side=4)
    want = images[:, :, 2:6, 4:8].float().mean((2, 3))
    assert torch.equal(of_patches(extractor)(images), want)
    assert of_patches(extractor).source != extractor.source
    other = torch.randint(0, 255, (30, 3, 9, 11), dtype=torch.uint8)
    inputs = Inputs(MemoryImages([images]), extractor=extractor, reference_images=MemoryImages([other]))
    stats = [FeatureStats(3).add(z[:, :, 2:6, 4:8].float().mean((2, 3))) for z in (images, other)]
    found = flat(PatchDistance().compute(inputs))
    assert found["patch-fd:mean"] == pytest.approx(frechet_distance(*stats), rel=1e-9)
    kept = FeatureStats(3, of_patches(extractor).source).add(other[:, :, 2:6, 4:8].float().mean((2, 3)))
    inputs.patch_reference = kept
    assert flat(PatchDistance().compute(inputs)) == pytest.approx(found)
    inputs.patch_reference = FeatureStats(3, extractor.source).add(rows(9, 3))
    with pytest.raises(UserError, match="resize"):
        flat(PatchDistance().compute(inputs))


def test_patches_need_larger_images() -> None:
    with pytest.raises(UserError, match="of 4x4 need images as large, got 3x9"):
        of_patches(pixel_extractor(side=4))(torch.zeros(2, 3, 9, 3, dtype=torch.uint8))
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
    found = flat(FrechetDistance().compute(inputs))
    assert np.array_equal(inputs.features, images.float().mean((2, 3)))
    assert isinstance(inputs.features, np.memmap) == (limit == 0)
    # One pass of padded chunks.
    assert sum(calls) == 24
    once_more = Inputs(MemoryImages([images]), extractor=extractor, reference=reference)
    assert flat(FrechetDistance().compute(once_more)) == found


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
    names = [name for name in METRICS if "extractor" in get_metrics([name])[name].needs]
    for name in sorted({*names} - {"fid", "patch-fd"}):
        (metric,) = get_metrics([name]).values()
        with pytest.raises(UserError, match=rf"(at least 2 images|needs several images).*|got {count}"):
            flat(metric.compute(inputs))


def test_only_inception_makes_a_fid() -> None:
    with pytest.raises(UserError, match="ask for the metric fd"):
        flat(FID().compute(given(rows(9), teacher=None, reference=FeatureStats(7))))
    inputs = given(rows(40))
    object.__setattr__(inputs.extractor, "name", "inception-2015")
    inputs.reference = FeatureStats(7, inputs.extractor.source).add(rows(50, seed=1))
    found = flat(FID().compute(inputs))
    assert found["fid:inception-2015"] == flat(FrechetDistance().compute(inputs))["fd:inception-2015"]
    assert found["fid:inception-2015/infinity"] < found["fid:inception-2015"]
