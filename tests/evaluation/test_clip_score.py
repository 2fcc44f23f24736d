"""CLIP score against its definition, on a random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes import pictures
from torch import Tensor

from evaluation.images import MemoryImages
from evaluation.metrics.base import Inputs
from evaluation.metrics.clip_score import ClipScore
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


def test_clip_score_takes_what_older_transformers_return(clip_directory: Path, monkeypatch) -> None:
    images, captions = pictures(0, 4), [scenes.scene_at(index, 7).caption for index in range(4)]
    score = ClipScore(clip_directory)
    now = score.cosines([images], captions)
    model = score._clip.model
    for name in ("get_image_features", "get_text_features"):
        inner = getattr(model, name)

        def bare(inner=inner, **inputs):
            output = inner(**inputs)
            return output if isinstance(output, Tensor) else output.pooler_output

        monkeypatch.setattr(model, name, bare)
    assert torch.equal(score.cosines([images], captions), now)


def test_clip_score_does_not_depend_on_the_batch_and_wants_one_caption_each(clip_directory: Path) -> None:
    images, captions = pictures(0, 60), [scenes.scene_at(index, 7).caption for index in range(60)]
    score = ClipScore(clip_directory)
    assert torch.equal(score.cosines([images], captions), score.cosines(images.split(7), captions))
    with pytest.raises(UserError, match="60 images and 59 captions"):
        score.cosines([images], captions[:59])
