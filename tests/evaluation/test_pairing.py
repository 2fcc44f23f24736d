"""Which caption is whose: by name, or by natural order; refused where neither says it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from fakes import refused
from PIL import Image

from evaluation.__main__ import main
from evaluation.captions import CaptionFile, paired, read_captions
from evaluation.files import open_images
from evaluation.image_sets import measure_set
from evaluation.names import in_known_order, natural
from stepdistill import scenes
from stepdistill.errors import UserError


def rendered(folder, names):
    """Scenes in files of these names, and their captions."""
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(scenes.image_at(index, 7)[1]).save(folder / name)
    return [scenes.scene_at(index, 7).caption for index in range(len(names))]


def test_numbers_in_names_count_as_numbers(tmp_path) -> None:
    """120 files 0.png .. 119.png used to be taken as 0, 1, 10, 100: the CLIP score of right pairs was 0.79."""
    captions = rendered(tmp_path / "images", [f"{index}.png" for index in range(24)])
    (tmp_path / "c.txt").write_text("\n".join(captions))
    found = measure_set(tmp_path / "images", metrics=["clip", "attributes"], captions=tmp_path / "c.txt")
    assert found["clip:scenes-v1"] > 70 and found["attributes/all"] == 1
    assert found["reference"] is None and found["extractor"] is None and found["captions_sha256"]


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["0.png", "1.png", "10.png"], True), (["img_2.png", "img_11.jpg"], True), (["a/0.png", "b/0.png"], False),
        (["000/7.png", "001/3.png"], True), (["3-a-cat.png", "12-a-dog.png"], True), (["cat.png", "dog.png"], False),
        (["1.png", "1.jpg"], False), (["seed3_1.png", "seed3_2.png"], True), (["a3f9.png", "b201.png"], False),
    ],
)  # fmt: skip
def test_names_tell_an_order_or_do_not(names, known) -> None:
    assert in_known_order(names) == known
    assert in_known_order(list(reversed(names))) == known


def test_natural_order() -> None:
    names = ["b/2.png", "b/10.png", "a/3.png", "a/03.png", "x²1.png"]
    assert sorted(names, key=natural) == ["a/03.png", "a/3.png", "b/2.png", "b/10.png", "x²1.png"]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "coco"])
def test_captions_find_their_images_by_name(tmp_path, form) -> None:
    names = ["dog.png", "sub/cat.png", "eel.png"]
    captions = dict(zip(names, rendered(tmp_path / "images", names), strict=True))
    # In an order of their own, and one too many.
    entries = [
        {"file_name": n, "caption": captions.get(n, "more")}
        for n in ("eel.png", "more.png", "sub/cat.png", "dog.png")
    ]
    path = tmp_path / f"c.{'json' if form == 'coco' else form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, entries)))
    elif form == "csv":
        path.write_text(
            "caption,file_name\n" + "\n".join(f'"{e["caption"]}",{e["file_name"]}' for e in entries)
        )
    elif form == "json":
        path.write_text(
            json.dumps({e["file_name"].removesuffix(".png"): {"prompt": e["caption"]} for e in entries})
        )
    else:
        images = [{"id": i, "file_name": e["file_name"]} for i, e in enumerate(entries)]
        notes = [{"image_id": i, "id": i, "caption": e["caption"]} for i, e in enumerate(entries)]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    opened = open_images(tmp_path / "images")
    assert paired(path, opened.names, 3, "here") == [captions[name] for name in opened.names]
    with pytest.raises(UserError, match=r"no caption for .*fox\.png of here; 1 images lack one"):
        paired(path, [*opened.names, "fox.png"], 4, "here")


def test_an_order_nobody_can_know_is_refused(tmp_path, capsys) -> None:
    rendered(tmp_path / "images", ["cat.png", "dog.png"])
    (tmp_path / "c.txt").write_text("a\nb\n")
    said = refused(
        capsys, "images", tmp_path / "images", "--captions", tmp_path / "c.txt", "--metrics", "clip"
    )
    assert (
        "the names of" in said
        and "like cat.png, don't say which of the captions" in said
        and "file_name" in said
    )
    with pytest.raises(UserError, match=r"has 2 captions for the 3 images of here; give one each"):
        paired(tmp_path / "c.txt", [], 3, "here")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"annotations": [{"image_id": 1, "id": 1, "bbox": []}]}, "COCO's annotations without captions"),
        ({"annotations": [3]}, "is no file of COCO annotations"), (3, "holds 3, which is no captions"),
        ([1], "caption 1 of"), ({"a": {"b": 1}}, "caption 1 of"),
    ],
)  # fmt: skip
def test_json_that_holds_no_captions(tmp_path, content, said) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_captions(tmp_path / "c.json")


def test_a_pickled_list_is_named_with_the_way_out(tmp_path) -> None:
    import pickle
    import shlex
    import subprocess
    import sys

    with open(tmp_path / "p.pkl", "wb") as file:
        pickle.dump(["a cat", "a dog"], file)
    with pytest.raises(UserError, match="is a pickle") as caught:
        read_captions(tmp_path / "p.pkl")
    # The command that it names does it.
    command = shlex.split(re.search(r"(python -c .*)$", str(caught.value)).group(1))
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert read_captions(tmp_path / "p.json") == ("a cat", "a dog")


def test_captions_are_drawn_from_a_longer_file_by_a_seed(tmp_path) -> None:
    (tmp_path / "c.json").write_text(json.dumps([f"caption {i}" for i in range(50)]))
    first, again, other = (
        CaptionFile("c", 9, seed=seed).located(tmp_path / "c.json").read() for seed in (0, 0, 1)
    )
    assert first == again != other and len(set(first)) == 9
    assert CaptionFile.open(tmp_path / "c.json", 9, 0).read() == first
    with pytest.raises(UserError, match="has 50 captions, but"):
        CaptionFile("c", 51, seed=0).located(tmp_path / "c.json")


def test_a_pinned_list_is_known_by_its_ends(tmp_path) -> None:
    import hashlib

    lines = [f"caption {i}" for i in range(60)]
    pin = hashlib.sha256("\n".join(lines[:20] + lines[-20:]).encode()).hexdigest()
    (tmp_path / "c.txt").write_text("\n".join(lines))
    assert CaptionFile("c", 60, ends=pin).located(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("\n".join(reversed(lines)))
    with pytest.raises(UserError, match="holds other captions than c"):
        CaptionFile("c", 60, ends=pin).located(tmp_path / "c.txt")


def test_what_the_model_does_not_read_is_said(tmp_path) -> None:
    """A folder of photographs used to be scored by the embedded model without a word."""
    captions = rendered(tmp_path / "images", ["0.png", "1.png", "2.png"])
    (tmp_path / "c.txt").write_text("\n".join([captions[0], "a dog on a sofa", " ".join([captions[2]] * 5)]))
    found = measure_set(tmp_path / "images", metrics=["clip"], captions=tmp_path / "c.txt")
    said = "\n".join(found["warnings"])
    assert "1 of 3 captions have words that scenes-v1 does not know, like caption 2" in said
    assert "1 of 3 captions have more than the" in said and "were cut" in said
    (tmp_path / "c.txt").write_text("\n".join(captions))
    assert measure_set(tmp_path / "images", metrics=["clip"], captions=tmp_path / "c.txt")["warnings"] == []


def test_clip_alone_loads_no_feature_network(tmp_path, monkeypatch, capsys) -> None:
    from evaluation import extractors

    captions = rendered(tmp_path / "images", ["0.png", "1.png"])
    (tmp_path / "c.txt").write_text("\n".join(captions))
    monkeypatch.setitem(extractors.EXTRACTORS, "scenes-v1", lambda *_: pytest.fail("it was loaded"))
    command = ["images", tmp_path / "images", "--metrics", "clip", "--captions", tmp_path / "c.txt"]
    main([*map(str, command), "-o", str(tmp_path / "r.json")])
    assert "clip:scenes-v1" in capsys.readouterr().out
    # Two images have a standard error, one would have none: JSON holds no NaN.
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "c.txt").write_text(captions[0])
    main([*map(str, command), "-o", str(tmp_path / "r.json")])
    text = (tmp_path / "r.json").read_text()
    assert "NaN" not in text and json.loads(text)["clip:scenes-v1/se"] is None
    assert np.isfinite(json.loads(text)["clip:scenes-v1"])
