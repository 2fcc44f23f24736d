"""CLIP score against its definition, on a random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes import pictures

from evaluation.decoding import Resize
from evaluation.images import MemoryImages
from evaluation.measure import Measurement, measure
from evaluation.metrics.base import Inputs
from evaluation.metrics.clip_score import ClipScore
from evaluation.protocol import PROTOCOLS
from evaluation.values import flat
from stepdistill import scenes
from stepdistill.errors import UserError


def test_clip_score_is_the_mean_cosine(clip_directory: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    images, captions = pictures(0, 70), [scenes.scene_at(index, 7).caption for index in range(70)]
    inputs = Inputs(images=MemoryImages(images.split(33)), captions=captions)
    found = flat(ClipScore(clip_directory, "tiny").compute(inputs))
    model = CLIPModel.from_pretrained(clip_directory)
    tokenizer = AutoTokenizer.from_pretrained(clip_directory)
    pixels = (images.float() / 255 - 0.5) / 0.25
    # The definition, through the towers themselves, one caption at a time.
    with torch.no_grad():
        pictured = model.visual_projection(model.vision_model(pixels).pooler_output)
        pooled = [model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output for text in captions]
        spoken = model.text_projection(torch.cat(pooled))
    cosine = (F.normalize(pictured, dim=1) * F.normalize(spoken, dim=1)).sum(1).double()
    assert found["clip:tiny"] == pytest.approx(100 * cosine.mean().item(), abs=1e-4)
    assert found["clip:tiny/se"] == pytest.approx(100 * cosine.std().item() / 70**0.5, abs=1e-4)


def test_preferences_are_the_cosines_of_the_bare_captions_and_samples(
    tmp_path, clip_directory, monkeypatch
) -> None:
    monkeypatch.setenv("STEPDISTILL_WEIGHTS", str(tmp_path))
    for name in ("pickscore-v1", "hpsv2-hf"):
        (tmp_path / name).symlink_to(clip_directory)
    protocol = replace(
        PROTOCOLS["scenes-2k"], clip_prefix="a photo of ", resize=Resize(size=16), reference=None
    )
    images, names = MemoryImages([pictures(0, 20)]), ["pickscore", "hpsv2", "clip"]
    found = measure(images, protocol, names, n=20, clip=clip_directory).numbers
    plain = measure(
        images, replace(protocol, clip_prefix="", resize=Resize()), ["clip"], n=20, clip=clip_directory
    )
    bare = plain.numbers[f"clip:{clip_directory.name}"]
    assert found["pickscore:pickscore-v1"] == found["hpsv2:hpsv2-hf"] == bare
    assert found[f"clip:{clip_directory.name}"] != bare
    ready = Measurement(protocol, names, 20, clip=clip_directory, dtype="bfloat16")
    half = ready.of(images)
    assert 0 < abs(half.numbers["pickscore:pickscore-v1-bf16"] - bare) < 1
    assert "pickscore-v1-bf16 ran in bfloat16, which changed what it gave for its first batch by" in " ".join(
        half.doubts
    )
    with pytest.raises(UserError, match=r"ImageReward is a BLIP network .* \(pip install image-reward\)"):
        measure(images, protocol, ["ImageReward"], n=20)


def test_clip_score_does_not_depend_on_the_batch_and_wants_one_caption_each(clip_directory: Path) -> None:
    images, captions = pictures(0, 60), [scenes.scene_at(index, 7).caption for index in range(60)]
    score = ClipScore(clip_directory)
    assert torch.equal(score.cosines([images], captions), score.cosines(images.split(7), captions))
    with pytest.raises(UserError, match="60 images and 59 captions"):
        score.cosines([images], captions[:59])
