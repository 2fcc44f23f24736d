"""evaluate(): good and bad samplers, and what is refused before anything is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import pictures, save_images, tiny_extractor
from torch import Tensor

import evaluation
from evaluation.protocol import PROTOCOLS
from evaluation.references import SceneReference
from stepdistill import scenes
from stepdistill.assets import ROOT
from stepdistill.errors import UserError


def test_evaluate_a_perfect_and_a_bad_sampler(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=250))
    asked: list[int] = []

    def perfect(prompts, seeds) -> Tensor:
        asked.append(len(prompts))
        wanted = map(scenes.parse_caption, prompts)
        drawn = [
            scenes.render(scene, np.random.default_rng(s)) for scene, s in zip(wanted, seeds, strict=True)
        ]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)

    def grey(prompts, seeds) -> Tensor:
        return torch.full((len(prompts), 3, 64, 64), 128, dtype=torch.uint8)

    options = {"protocol": protocol, "n": 100, "metrics": ("fd", "attributes"), "extractor": tiny_extractor()}
    good, bad = evaluation.evaluate(perfect, **options), evaluation.evaluate(grey, **options)
    assert asked == [64, 36]
    assert good["protocol"] == "scenes-2k[n=100, extractor=tiny, other reference]" and good["n"] == 100
    assert good["fd:tiny"] < 0.1 * bad["fd:tiny"]
    assert good["attributes/all"] > 0.95 and bad["attributes/all"] == 0
    assert evaluation.evaluate(perfect, **options, batch=7) == good


def test_evaluate_class_conditional_against_real_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    save_images(tmp_path / "real", pictures(0, 30))
    asked: list[int] = []

    def sampler(classes, seeds) -> Tensor:
        asked.extend(classes)
        return pictures(int(seeds[0]), len(classes))

    found = evaluation.evaluate(
        sampler, reference=tmp_path / "real", classes=4, metrics=("fd",), extractor=tiny_extractor()
    )
    assert asked == [index % 4 for index in range(30)]
    assert found["protocol"] == "images:real" and found["fd:tiny"] < 1e-8
    with pytest.raises(UserError, match="'clip' needs captions, which is not here"):
        evaluation.evaluate(sampler, reference=tmp_path / "real", metrics=("fd", "clip"))


def test_evaluate_refuses_what_makes_no_sense() -> None:
    def wrong(prompts, seeds) -> Tensor:
        return torch.zeros(len(prompts) - 1, 3, 8, 8, dtype=torch.uint8)

    def floats(prompts, seeds) -> Tensor:
        return torch.zeros(len(prompts), 3, 8, 8)

    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        evaluation.evaluate(wrong, n=1, metrics=("attributes",))
    with pytest.raises(UserError, match=r"'atributes'\. Did you mean 'attributes'"):
        evaluation.evaluate(wrong, n=4, metrics=("atributes",))
    with pytest.raises(UserError, match="no protocol 'scenes'"):
        evaluation.evaluate(wrong, protocol="scenes")
    with pytest.raises(UserError, match="'latency' needs timed, which is not here"):
        evaluation.evaluate(wrong, n=4, metrics=("latency",))
    with pytest.raises(UserError, match="3 images for 4 prompts"):
        evaluation.evaluate(wrong, n=4, metrics=("attributes",))
    with pytest.raises(UserError, match="uint8 tensor"):
        evaluation.evaluate(floats, n=4, metrics=("attributes",))


def test_evaluate_is_called_as_the_documentation_says(tmp_path, monkeypatch) -> None:
    from evaluation import FeatureStats, evaluate, frechet_distance

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    drawn = pictures(0, 30)

    def sampler(prompts, seeds) -> Tensor:
        return drawn[: len(prompts)]

    net = tiny_extractor()
    reference = FeatureStats(net.dim, net.source).add(net(pictures(100, 40)))
    found = evaluate(sampler, "scenes-2k", n=30, metrics=("fd",), extractor=net, reference=reference)
    truth = frechet_distance(FeatureStats(net.dim, net.source).add(net(drawn)), reference)
    assert found["fd:tiny"] == pytest.approx(truth, rel=1e-9)
    with pytest.raises(AttributeError):
        evaluation.distance  # noqa: B018


def test_what_a_metric_cannot_be_computed_from_is_said_before_anything_is_drawn() -> None:
    def sampler(prompts, seeds) -> Tensor:
        raise AssertionError("a sample was drawn")

    alone = replace(PROTOCOLS["scenes-2k"], companion="")
    for metric, n, reason in (
        ("fid", 20, "FID is defined by the extractor inception-2015, and scenes-v1 is in use"),
        ("is", 20, "needs a classifier"),
        ("prdc", 5, "more than 5 images on each side, got 5"),
        ("diversity", 3, "every prompt here has one"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluation.evaluate(sampler, alone, n=n, metrics=(metric,))
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        evaluation.evaluate(sampler, n=20, metrics=("clip",), clip=Path(__file__).parent)


@pytest.mark.skipif(
    not all((ROOT / name).is_dir() for name in ("scenes-v1", "clip")),
    reason="needs assets/scenes-v1 and assets/clip",
)
def test_embedded_networks_tell_right_from_wrong(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=250))

    def draw(shift: int, noise: float):
        def sampler(prompts, seeds) -> Tensor:
            drawn = np.stack([scenes.image_at(seed + shift, protocol.prompt_seed)[1] for seed in seeds])
            noisy = drawn + noise * np.random.default_rng(int(seeds[0])).standard_normal(drawn.shape)
            return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)

        return sampler

    right, noisy, moved = (
        evaluation.evaluate(draw(shift, noise), protocol=protocol, n=120)
        for shift, noise in ((0, 0), (0, 40), (1, 0))
    )
    assert right["fd:scenes-v1"] < 0.2 * noisy["fd:scenes-v1"]
    assert moved["fd:scenes-v1"] == pytest.approx(right["fd:scenes-v1"], abs=5 * right["fd:scenes-v1/se"])
    assert right["clip:scenes-v1"] > moved["clip:scenes-v1"] + 30
    assert right["attributes/all"] > 0.95 and moved["attributes/all"] < 0.1
