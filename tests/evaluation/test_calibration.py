"""Distances on the embedded networks move as they must when images get worse in a known way."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation.extractors import Extractor, load_extractor
from evaluation.frechet import frechet_distance
from evaluation.images import MemoryImages
from evaluation.metrics.base import Inputs
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.paired import Paired
from evaluation.metrics.prdc import prdc
from evaluation.stats import FeatureStats
from evaluation.values import flat
from stepdistill import scenes
from stepdistill.assets import ROOT
from stepdistill.errors import UserError

pytestmark = pytest.mark.skipif(
    not all((ROOT / name).is_dir() for name in ("scenes-v1", "clip")),
    reason="needs assets/scenes-v1 and clip",
)
N = 160
# Enough where one image is compared with another, or with its caption.
FEW = 64


def pictures(first: int, count: int) -> Tensor:
    drawn = np.stack([scenes.image_at(index, 11)[1] for index in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("scenes-v1")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(0, N)


@pytest.fixture(scope="module")
def real(extractor: Extractor) -> Tensor:
    return extractor(pictures(N, 2 * N))


def blurred(images: Tensor, sigma: float) -> Tensor:
    at = torch.arange(-6, 7).float()
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1)
    x = F.pad(images.float(), (6, 6, 6, 6), mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel[:, :, :, None], groups=3), kernel[:, :, None, :], groups=3)
    return x.round().to(torch.uint8)


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def jpeg(images: Tensor, quality: int) -> Tensor:
    found = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        found.append(torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1))
    return torch.stack(found)


def darker(images: Tensor, gain: float) -> Tensor:
    return (images * gain).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("worse", "levels"),
    [
        (blurred, (0.7, 1.2, 2, 3)),
        (noisy, (8, 16, 32, 64)),
        (jpeg, (75, 40, 15, 5)),
        (darker, (0.9, 0.8, 0.6, 0.4)),
    ],
)
def test_distance_strictly_rises(worse, levels, extractor: Extractor, images: Tensor, real: Tensor) -> None:
    reference = FeatureStats(extractor.dim, extractor.source).add(real)
    sets = [images, *(worse(images, level) for level in levels)]
    found = [
        frechet_distance(FeatureStats(extractor.dim, extractor.source).add(extractor(each)), reference)
        for each in sets
    ]
    assert all(a < b for a, b in itertools.pairwise(found)), found
    # Which is the bias of few samples, nearly all of it.
    assert found[-1] > 2 * found[0]


def test_dropped_classes_raise_the_distance_and_lower_recall(extractor: Extractor, real: Tensor) -> None:
    """A sampler that knows fewer backgrounds: what it draws is right, but some is never drawn."""
    drawn = extractor(pictures(3 * N, 4 * N))
    background = [scenes.scene_at(index, 11).background for index in range(3 * N, 7 * N)]
    reference = FeatureStats(extractor.dim, extractor.source).add(real)
    distances, recalls, precisions = [], [], []
    for kept in (8, 6, 4, 2):
        colours = set(list(scenes.COLOURS)[:kept])
        rows = drawn[torch.tensor([colour in colours for colour in background])][:N]
        distances.append(frechet_distance(FeatureStats(extractor.dim, extractor.source).add(rows), reference))
        found = prdc(rows.numpy(), real.numpy())
        recalls.append(found["recall"])
        precisions.append(found["precision"])
    assert all(a < b for a, b in itertools.pairwise(distances)), distances
    assert all(a > b for a, b in itertools.pairwise(recalls)), recalls
    assert recalls[-1] < 0.7 * recalls[0] and min(precisions) > precisions[0] - 0.1, (recalls, precisions)


def test_clip_falls_on_shuffled_captions(images: Tensor) -> None:
    images = images[:FEW]
    captions = [scenes.scene_at(index, 11).caption for index in range(FEW)]
    score = ClipScore()

    def of(told: list[str]) -> float:
        return flat(score.compute(Inputs(MemoryImages([images]), told)))["clip:scenes-v1"]

    half = captions[: FEW // 2] + captions[FEW // 2 + 1 :] + captions[FEW // 2 : FEW // 2 + 1]
    found = [of(captions), of(half), of(captions[1:] + captions[:1])]
    assert found[0] > found[1] + 5 > found[2] + 10, found


def test_paired_distance_and_agreement_move_with_the_change(images: Tensor) -> None:
    images, found = images[:FEW], []
    for name in ("scenes-v1", "clip-scenes-v1"):
        net = load_extractor(name)
        for student in (images, noisy(images, 16), images.roll(1, 0)):
            inputs = Inputs(MemoryImages([student]), extractor=net, teacher=MemoryImages([images]))
            values = flat(Paired().compute(inputs))
            found.append((values[f"paired:{name}/distance"], values[f"paired:{name}/cosine"]))
    for same, near, other in (found[:3], found[3:]):
        assert same == pytest.approx((0, 1), abs=1e-6)
        assert 0 < near[0] < 0.7 * other[0] and other[0] == pytest.approx(1, abs=0.25)
        assert other[1] < near[1] < 1


def test_inference_is_the_network_itself(extractor: Extractor, images: Tensor) -> None:
    from evaluation.feature_net import FeatureNet

    plain = FeatureNet.load(ROOT / "scenes-v1")
    truth, found = plain(images[:30]), extractor(images[:30])
    assert float((found - truth).norm() / truth.norm()) < 1e-6
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in plain.for_inference().modules())
    # The network that was copied is as it was.
    assert torch.equal(plain(images[:30]), truth)


def test_the_scene_network_answers_many_questions_and_has_no_inception_score(extractor: Extractor) -> None:
    from evaluation.metrics.inception_score import InceptionScore

    assert extractor.head is None and extractor.side == 64
    with pytest.raises(UserError, match="needs a classifier"):
        InceptionScore().compute(Inputs(MemoryImages([pictures(0, 2)]), extractor=extractor))


def test_a_network_with_one_question_has_an_inception_score(tmp_path) -> None:
    from evaluation.feature_net import FeatureNet

    torch.manual_seed(0)
    net = FeatureNet("mine", 32, 16, {"label": ["a", "b", "c"]})
    net.save(tmp_path / "net")
    extractor = load_extractor(tmp_path / "net")
    features = extractor(pictures(0, 4))
    truth = FeatureNet.load(tmp_path / "net").logits(features)["label"]
    np.testing.assert_allclose(extractor.head(features.numpy()), truth.detach().numpy(), atol=1e-5)
