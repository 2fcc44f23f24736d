"""Metrics: invariance to batches, calibration on distorted images, and what they need."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fakes import pictures, stats_of
from torch import Tensor

from evaluation.extractors import Extractor
from evaluation.frechet import frechet_distance
from evaluation.images import MemoryImages, rechunked
from evaluation.metrics import METRICS, get_metrics
from evaluation.metrics.attributes import Attributes
from evaluation.metrics.base import Inputs
from evaluation.metrics.fd import FrechetDistance
from evaluation.stats import FeatureStats
from evaluation.values import flat
from stepdistill import scenes
from stepdistill.errors import UserError


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return pictures(0, 400), pictures(400, 400)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_distance_has_the_same_bits_for_every_batch_size(batch: int, extractor: Extractor, data) -> None:
    images, reference = data[0][:203], stats_of(data[1], extractor)

    def measured(batches) -> dict[str, float]:
        inputs = Inputs(images=MemoryImages(batches), extractor=extractor, reference=reference)
        return flat(FrechetDistance().compute(inputs))

    whole = measured([images])
    assert measured(images.split(batch)) == whole
    assert set(whole) == {"fd:tiny", "fd:tiny/se", "fd:tiny/infinity", "fd:tiny/infinity/se"}
    assert whole["fd:tiny/se"] > 0 and whole["fd:tiny/infinity"] < whole["fd:tiny"]


def test_padding_does_not_leak_into_features(extractor: Extractor, data) -> None:
    torch.testing.assert_close(extractor(data[0][:5]), extractor(data[0][:16])[:5], rtol=0, atol=1e-6)
    assert extractor(data[0][:5]).shape == (5, 24)


def test_rechunked_keeps_order_and_sizes() -> None:
    rows = torch.arange(100)
    for sizes in ([100], [1] * 100, [33, 0, 40, 27]):
        parts = list(rechunked(rows.split(sizes), 16))
        assert [len(part) for part in parts] == [16] * 6 + [4]
        assert torch.equal(torch.cat(parts), rows)


def test_first_takes_exactly_so_many(data) -> None:
    images = MemoryImages(data[0].split(64))
    assert torch.equal(torch.cat(list(images.first(100))), data[0][:100]) and len(images.first(100)) == 100
    assert images.first(1000) is images


def rising(levels: list[Tensor], reference: FeatureStats, extractor: Extractor) -> list[float]:
    return [frechet_distance(stats_of(level, extractor), reference) for level in levels]


def test_distance_rises_with_blur(extractor: Extractor, data) -> None:
    def blurred(sigma: float) -> Tensor:
        if not sigma:
            return data[0]
        at = torch.arange(-6, 7).float()
        kernel = torch.exp(-(at**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).repeat(3, 1, 1)
        x = F.pad(data[0].float(), (6, 6, 6, 6), mode="replicate")
        x = F.conv2d(F.conv2d(x, kernel[:, :, :, None], groups=3), kernel[:, :, None, :], groups=3)
        return x.round().to(torch.uint8)

    found = rising([blurred(s) for s in (0, 0.8, 1.2, 2, 3)], stats_of(data[1], extractor), extractor)
    assert found == sorted(found) and found[-1] > 3 * found[0]


def test_distance_rises_with_noise(extractor: Extractor, data) -> None:
    noise = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(0))
    levels = [(data[0] + s * noise).clamp(0, 255).to(torch.uint8) for s in (0.0, 16, 32, 64, 100)]
    found = rising(levels, stats_of(data[1], extractor), extractor)
    assert found == sorted(found) and found[-1] > 3 * found[0]


def test_distance_rises_with_dropped_classes(extractor: Extractor, data) -> None:
    background = [scenes.scene_at(index, 7).background for index in range(400)]

    def without(count: int) -> Tensor:
        dropped = set(list(scenes.COLOURS)[len(scenes.COLOURS) - count :])
        return data[0][torch.tensor([colour not in dropped for colour in background])]

    found = rising([without(count) for count in (0, 2, 4, 6)], stats_of(data[1], extractor), extractor)
    assert found == sorted(found) and found[-1] > 3 * found[0]


def test_attributes_of_rendered_scenes_and_of_the_wrong_captions() -> None:
    captions = [scenes.scene_at(index, 7).caption for index in range(60)]
    right = flat(
        Attributes().compute(Inputs(images=MemoryImages(pictures(0, 60).split(9)), captions=captions))
    )
    moved = captions[1:] + captions[:1]
    wrong = flat(Attributes().compute(Inputs(images=MemoryImages([pictures(0, 60)]), captions=moved)))
    assert right["attributes/all"] > 0.95 and wrong["attributes/all"] < 0.1
    assert {f"attributes/{name}" for name in (*scenes.ATTRIBUTES, "all")} < set(right)
    whole = scenes.attribute_accuracy(pictures(0, 60).permute(0, 2, 3, 1).numpy(), moved)
    split = flat(Attributes().compute(Inputs(images=MemoryImages(pictures(0, 60).split(7)), captions=moved)))
    assert split == wrong
    assert whole == {name: pytest.approx(split[f"attributes/{name}"], abs=1e-12) for name in whole}
    share = wrong["attributes/all"]
    assert wrong["attributes/all/se"] == pytest.approx((share * (1 - share) / 60) ** 0.5)


def test_attributes_refuse_captions_that_are_none() -> None:
    with pytest.raises(UserError, match="2 images and 1 captions"):
        flat(
            Attributes().compute(Inputs(images=MemoryImages([pictures(0, 2)]), captions=["a photo of a cat"]))
        )
    with pytest.raises(UserError, match="describes no scene"):
        flat(
            Attributes().compute(Inputs(images=MemoryImages([pictures(0, 1)]), captions=["a photo of a cat"]))
        )


def test_a_value_stands_for_its_metric() -> None:
    assert list(get_metrics(["attributes/all", "attributes", "attributes/count"])) == ["attributes"]


def test_every_metric_says_what_it_needs() -> None:
    fields = {*Inputs.__dataclass_fields__, "features", "timed"}
    for name in METRICS:
        (metric,) = get_metrics([name]).values()
        assert metric.needs and metric.needs <= fields
        assert len({value.name for value in metric.values}) == len(metric.values)
        assert all(value.name.startswith((name, "fd_ratio")) for value in metric.values)
        assert any(value.main and value.better != "none" for value in metric.values)
