"""GenEval in process: its rules on boxes, and the walk from a pipeline to its score with tiny networks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import refused
from PIL import Image

from evaluation import detector
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.detector import CLASSES, Detected, Detector, judged, relations
from evaluation.protocol import PROTOCOLS


@pytest.mark.parametrize(
    ("box", "there"),
    [
        ((0, 0, 10, 10), {"left of"}),
        ((80, 0, 90, 10), {"right of"}),
        ((40, 50, 50, 60), {"below"}),
        ((40, -90, 50, -80), {"above"}),
        # Both shares of the way are above one half.
        ((80, 40, 90, 50), {"right of", "below"}),
        # Nearer than a tenth of the two widths.
        ((41, 0, 51, 10), set()),
        ((40, 0, 50, 10), set()),
    ],
)
def test_relations_of_boxes(box, there) -> None:
    assert relations(box, (40, 0, 50, 10)) == there


def detected(*boxes: tuple[int, int]) -> list[Detected]:
    return [
        Detected(1 - 0.1 * i, (x, y, x + 10, y + 10), np.ones((1, 1), bool)) for i, (x, y) in enumerate(boxes)
    ]


def test_the_rules_are_genevals() -> None:
    objects = {"dog": detected((0, 0), (100, 0)), "cat": detected((50, 0))}
    seen = []

    def colours(own, name):
        seen.append((len(own), name))
        return ["red", "blue"][: len(own)]

    def right(include: list[dict], **more) -> bool:
        return judged(objects, {"include": include, **more}, colours)[0]

    dog, cat = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
    assert right([dog]) and right([{**dog, "count": 2}]) and not right([{**dog, "count": 3}])
    # Two are wanted and three excluded.
    assert right([{**dog, "count": 2}], exclude=[{**dog, "count": 3}])
    assert not right([dog], exclude=[{**dog, "count": 2}])
    # Colours are those of the most certain alone.
    assert right([{**dog, "color": "red"}]) and not right([{**dog, "color": "blue"}])
    assert seen == [(1, "dog"), (1, "dog")]
    assert right([cat, {**dog, "position": ["left of", 0]}]) and not right(
        [cat, {**dog, "position": ["above", 0]}]
    )
    # Every dog to every cat.
    assert not right([cat, {**dog, "count": 2, "position": ["left of", 0]}])
    missing = judged(
        objects, {"include": [{"class": "bus", "count": 1}, {**dog, "position": ["left of", 0]}]}, colours
    )
    assert missing == (False, "0 of 1 bus; dog not left of its target")


@pytest.fixture
def networks(tmp_path, monkeypatch, clip_directory):
    """A random Mask2Former of three queries and a CLIP, where public weights are looked for."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    for variable in ("STEPDISTILL_WEIGHTS", "HF_HUB_CACHE", "STEPDISTILL_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "weights"))
    monkeypatch.setattr(detector, "_SHORT", 64)
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=3, num_labels=80,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "weights" / "mask2former-swin-s")
    shutil.copytree(clip_directory, tmp_path / "weights" / "clip-vit-l14")
    return tmp_path


def test_objects_and_their_colours(networks) -> None:
    made = Detector()
    queries = made.model(pixel_values=torch.zeros(1, 3, 64, 64))

    def says(**_):
        """A dog on the left half and a smaller, less certain one at the right; the third query is nothing."""
        queries.class_queries_logits[:] = -20
        for query, label, logit in ((0, 16, 9), (1, 16, 4), (2, 80, 9)):
            queries.class_queries_logits[0, query, label] = logit
        queries.class_queries_logits[0, 1, 80] = 3
        queries.masks_queries_logits[:] = -9
        queries.masks_queries_logits[0, 0, :, :8] = 9
        queries.masks_queries_logits[0, 1, 4:8, 12:] = 9
        return queries

    made.model.forward = says
    image = Image.new("RGB", (128, 128), "red")
    objects = made.objects(image)
    assert list(objects) == ["dog"] and CLASSES.index("dog") == 16 and len(CLASSES) == 80
    first, second = objects["dog"]
    assert first.score > 0.9 > second.score > 0.5 and first.box[:2] == (0, 0) and first.box[3] == 128
    assert abs(first.box[2] - 64) <= 8 and second.box[2:] == (128, second.box[3]) and second.box[0] > 80
    assert first.mask.shape == (128, 128) and first.mask[:, :56].all() and not first.mask[:, 72:].any()
    dog = {"class": "dog", "count": 2}
    assert made.judge(image, {"tag": "two_object", "include": [dog]}) == (True, "")
    # Where objects are counted, only certain ones are.
    assert made.judge(image, {"tag": "counting", "include": [dog]}) == (False, "1 of 2 dog")
    (colour,) = made.colours(image, [first], "dog")
    assert colour in detector.COLOURS


def test_from_a_pipeline_to_the_score(networks, tiny_sd, monkeypatch, capsys) -> None:
    small = replace(
        PROTOCOLS["geneval"], n=4, captions=CaptionFile("evaluation_metadata", 2), images_per_prompt=2
    )
    monkeypatch.setitem(PROTOCOLS, "geneval", small)
    dog = {"class": "dog", "count": 1}
    lines = [{"tag": "counting", "prompt": "a red star", "include": [dog]},
             {"tag": "single_object", "prompt": "a blue star", "include": [], "exclude": [dog]}]  # fmt: skip
    (networks / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["geneval", "run", "--pipeline", tiny_sd, "--steps", 1, "--captions", networks / "m.jsonl"]
    main([*map(str, command), "--out", str(networks / "o")])
    shown = capsys.readouterr().out
    assert "2 prompts, 4 images" in shown and "warning: judged by Meta's Mask2Former" in shown
    # Random networks are certain of nothing.
    scores = json.loads((networks / "o" / "geneval.json").read_text())
    assert (scores["geneval/counting"], scores["geneval/single_object"], scores["geneval"]) == (0, 1, 0.5)
    assert "there is no image at" in refused(capsys, "geneval", "score", networks, "--out", networks)
    (networks / "weights" / "mask2former-swin-s" / "config.json").unlink()
    message = refused(capsys, *command, "--out", networks / "p")
    assert (
        "the weights mask2former-swin-s (276 MB" in message and "hf download facebook/mask2former" in message
    )
    assert not (networks / "p" / "samples").exists()
