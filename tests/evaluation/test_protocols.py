"""Protocols: the files say what they should, hashes cover what changes a number, and inputs are found or named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.protocol import PROTOCOLS, Protocol, checked_n, get_protocol, load_protocol
from evaluation.references import NamedReference
from stepdistill.drawing import QUANTISE
from stepdistill.errors import UserError

# A change here makes every published result of that protocol incomparable: raise its version with it.
HASHES = {
    "afhq64-50k": "785412bb4cbe1399",
    "cifar10-50k": "d16a867260aba230",
    "coco14-10k": "8e8084242e59c115",
    "coco14-30k": "b2e140ba5c330225",
    "coco14-30k-drawn": "563b38b257f8f6f5",
    "coco17-5k": "2274b8425e5d7292",
    "ffhq64-50k": "7e83151a2eea0e32",
    "geneval": "937d5f9d8fba4ff4",
    "imagenet256-50k": "5cd8aca2df4ee31f",
    "imagenet512-50k": "c0e733d68a835fd9",
    "imagenet512-50k-dino": "0e98fcaae8432f43",
    "imagenet64-50k": "fd0df34bdd3f2d5f",
    "mjhq-30k": "62f55451bc17c4fe",
    "scenes-2k": "e91ba17ff0c64669",
    "scenes-seeds": "37d8787754c082a6",
}


def small(**changes) -> Protocol:
    usual = {
        "name": "small", "version": 1, "n": 4, "conditions": "captions", "metrics": ("fd",),
        "reference": NamedReference("pictures", 3), "captions": CaptionFile("lines", 4),
    }  # fmt: skip
    return Protocol(**(usual | changes))


def test_hashes_stand() -> None:
    assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == HASHES


def test_every_file_carries_its_source_and_agrees_with_its_name() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.source and protocol.about and protocol.n >= 2
        if isinstance(protocol.reference, NamedReference):
            assert protocol.reference.about


@pytest.mark.parametrize(
    "change",
    [
        {"n": 8, "captions": CaptionFile("lines", 8)}, {"quantise": "floor"}, {"first_seed": 1}, {"resolution": 64},
        {"resize": Resize("centre", 32)}, {"extractor": "inception-2015"},
        {"clip": "vit-b-32"}, {"clip_prefix": "A photo depicts "}, {"patch": 299}, {"version": 2},
        {"captions": CaptionFile("others", 4)}, {"reference": NamedReference("pictures", 4)},
        {"reference": NamedReference("pictures", 3, Resize(size=64))},
        {"images_per_prompt": 2, "captions": CaptionFile("lines", 2)},
    ],
)  # fmt: skip
def test_the_hash_covers_what_changes_a_number(change) -> None:
    assert small(**change).hash != small().hash


def test_the_hash_ignores_explanations_places_and_fields_not_in_use() -> None:
    same = small(
        about="words", source="a paper", metrics=("kid",), resize=Resize(),
        reference=NamedReference("pictures", 3, about="words", path="/somewhere"),
        captions=CaptionFile("lines", 4, path="/else"),
    )  # fmt: skip
    assert same.hash == small().hash and "patch" not in small().describe()


def test_prompts_and_seeds_of_several_images_a_prompt(tmp_path) -> None:
    (tmp_path / "lines.txt").write_text("a\nb\n")
    protocol = small(captions=CaptionFile("lines", 2, path=str(tmp_path / "lines.txt")), images_per_prompt=2)
    assert protocol.prompts(4) == ["a", "a", "b", "b"] and protocol.seeds(4) == [0, 1, 2, 3]
    assert replace(protocol, seeds_by="prompt", first_seed=42).seeds(4) == [42, 43, 42, 43]
    assert PROTOCOLS["cifar10-50k"].prompts(12) == [*range(10), 0, 1]
    assert replace(PROTOCOLS["cifar10-50k"], images_per_prompt=3, classes=2).prompts(8) == [
        0,
        0,
        0,
        1,
        1,
        1,
        0,
        0,
    ]


def test_quantisation_is_what_each_name_says() -> None:
    u = torch.tensor([0.0, 0.4999, 0.5, 0.5001, 1.49, 1.5, 254.6, 255.0], dtype=torch.float64) / 255
    found = {name: [int(x) for x in quantise(u)] for name, quantise in QUANTISE.items()}
    assert found["floor"] == [0, 0, 0, 0, 1, 1, 254, 255]
    assert found["edm"] == [0, 0, 1, 1, 1, 2, 255, 255]
    # Halves to even.
    assert found["round"] == [0, 0, 0, 1, 1, 2, 255, 255]


def test_resize_crops_the_middle_and_uses_its_filter() -> None:
    wide = np.zeros((20, 50, 3), np.uint8)
    wide[:, 15:35] = np.arange(20, dtype=np.uint8)[None, :, None]
    image = Image.fromarray(wide)
    assert np.array_equal(np.asarray(Resize("centre")(image)), wide[:, 15:35])
    for name in ("lanczos", "box"):
        want = image.crop((15, 0, 35, 20)).resize((10, 10), Image.Resampling[name.upper()])
        assert np.array_equal(np.asarray(Resize("centre", 10, name)(image)), np.asarray(want))
    assert not Resize() and Resize("centre") and Resize(size=8)
    window = Resize("window", 6)(image)
    assert np.array_equal(np.asarray(window), wide[7:13, 22:28])
    with pytest.raises(UserError, match="a filter among"):
        Resize(filter="sinc")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "a cat\na dog\n"),
        ("c.jsonl", '{"prompt": "a cat"}\n{"caption": "a dog"}\n'),
        ("c.json", '["a cat", "a dog"]'),
        ("meta_data.json", '{"x1": {"category": "animals", "prompt": "a cat"}, "x0": {"prompt": "a dog"}}'),
        (
            "captions_val.json",
            json.dumps(
                {
                    "annotations": [
                        {"image_id": 9, "id": 5, "caption": "a dog"},
                        {"image_id": 2, "id": 7, "caption": "a second cat"},
                        {"image_id": 2, "id": 6, "caption": "a cat"},
                    ]
                }
            ),
        ),
    ],
)
def test_captions_in_every_layout(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content)
    assert CaptionFile("c", 2).located(tmp_path / name).read() == ("a cat", "a dog")


def test_captions_that_are_missing_too_few_or_empty(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_REFERENCES", str(tmp_path))
    with pytest.raises(UserError, match=rf"nothing for the captions c at {tmp_path}/c.txt.*with --captions"):
        CaptionFile("c", 2).located()
    (tmp_path / "c.txt").write_text("one\n")
    with pytest.raises(UserError, match="has 1 captions, but the protocol's c has 2"):
        CaptionFile("c", 2).located()
    (tmp_path / "c.txt").write_text("one\n \n")
    with pytest.raises(UserError, match=r"caption 2 of .*c\.txt is empty"):
        CaptionFile("c", 2).located()
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UserError, match="not UTF-8 text or JSON"):
        CaptionFile("c", 2).located(tmp_path / "c.json")


def test_references_are_found_and_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_REFERENCES", str(tmp_path))
    with pytest.raises(UserError, match=rf"the reference pictures at {tmp_path}/pictures, .*--reference"):
        small(captions=None, conditions="none").located()
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate([(8, 8), (12, 8), (8, 20)]):
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    reference = NamedReference("pictures", 3, Resize("centre", 8, "box")).located()
    (batch,) = reference.resized()
    # Three sizes, one result.
    assert batch.shape == (3, 3, 8, 8) and batch[:, 0, 0, 0].tolist() == [0, 1, 2]
    content = reference.sha256()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "pictures" / "0.png")
    assert reference.sha256() != content
    with pytest.raises(UserError, match="has 3 images, but the reference pictures has 4"):
        NamedReference("pictures", 4).located()


def test_files_of_ones_own_and_what_is_wrong_with_them(tmp_path) -> None:
    def written(content: str) -> Path:
        (tmp_path / "mine.yaml").write_text(content)
        return tmp_path / "mine.yaml"

    good = "{name: mine, version: 1, n: 9, conditions: none, metrics: [fd], reference: {kind: scenes, n: 50}}"
    assert get_protocol(str(written(good))).reference.n == 50
    for content, message in (
        (good.replace("version", "vershun"), "no field 'vershun'. Did you mean 'version'"),
        (good.replace("n: 9", "n: nine"), "n must be of type int, got 'nine'"),
        (good.replace("version: 1, ", ""), "lacks the field version"),
        (good.replace("kind: scenes", "kind: heap"), "reference.kind must be scenes, files or named"),
        (good.replace("conditions: none", "conditions: captions"), "needs `captions`"),
        (good.replace("conditions: none", "conditions: some"), "conditions 'some'; it must be one of"),
        (good[:-1], "not valid YAML"),
        ("[1]", "expected sections of"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?").replace(".", r"\.")):
            load_protocol(written(content))
    with pytest.raises(UserError, match=r"there is no file nowhere\.yaml"):
        get_protocol("nowhere.yaml")
    with pytest.raises(UserError, match="Did you mean 'coco14-30k'"):
        get_protocol("coco-30k")


def test_no_more_samples_than_captions() -> None:
    with pytest.raises(UserError, match="captions for 30000 samples"):
        checked_n(30_001, PROTOCOLS["coco14-30k"])
