"""Sources of examples: order, partitions, what is dropped and why, and fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import encoded, noise, source
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.scenes import image_at
from training.data import base, lines, order


def write_parquet(
    path: Path, count: int, labels: Any = None, row_group_size: int = 4, **columns: Any
) -> Path:
    images = [{"bytes": encoded(noise(i)), "path": f"{i}.png"} for i in range(count)]
    table = {"image": columns.pop("image", images), **columns}
    pq.write_table(
        pa.table(table if labels is None else {**table, "label": labels}), path, row_group_size=row_group_size
    )
    return path


# ---------------------------------------------------------------------------------------------- order


def test_order_visits_every_example_once_per_epoch() -> None:
    flat = [index for batch in range(10) for index in order(3, 20, 6 * batch, 6)]
    assert sorted(flat[:20]) == sorted(flat[20:40]) == list(range(20))
    # Another permutation every epoch.
    assert flat[:20] != flat[20:40]
    assert flat[:20] != list(range(20)) and flat[:20] != order(4, 20, 0, 20)


def test_orders_too_long_to_be_listed_are_permutations_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LISTED", 5)
    for size in (6, 64, 1000):
        flat = [index for first in range(0, 3 * size, 7) for index in order(1, size, first, 7)][: 3 * size]
        epochs = [flat[start : start + size] for start in range(0, 3 * size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(size))
    monkeypatch.undo()
    billion = order(0, 10**9, 10**8, 4000)
    assert len(set(billion)) == 4000 and max(billion) < 10**9
    # Even over the whole.
    assert np.mean(billion) == pytest.approx(5e8, rel=0.05)
    assert billion[100:] == order(0, 10**9, 10**8 + 100, 3900)


def test_lines_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CHUNK", 50)
    texts = [f"picture {i} \u00e9" if i % 9 else "" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(texts[:200]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("\n".join(texts[200:]) + "\n", encoding="utf-8")
    source = lines.Lines(lines.Lines.Config(path=tmp_path))
    assert source.size == 300 and list(source.captions) == texts
    before = source.fingerprint()
    (tmp_path / "c.txt").write_text("\n".join(texts[201:]) + "\n", encoding="utf-8")
    assert lines.Lines(lines.Lines.Config(path=tmp_path)).fingerprint() != before
    with pytest.raises(UserError, match="holds no prompts"):
        lines.Lines(lines.Lines.Config(path=tmp_path / "b.txt"))


def test_order_does_not_depend_on_how_the_stream_is_cut() -> None:
    flat = [index for batch in range(6) for index in order(0, 7, 4 * batch, 4)]
    assert flat == order(0, 7, 0, 24) == [index for first in range(24) for index in order(0, 7, first, 1)]
    # Those after the first 20 need none of the 20, whatever sizes their batches had.
    assert order(0, 7, 20, 4) == flat[20:24] and order(0, 7, 13, 5) == flat[13:18]
    assert len(order(0, 3, 0, 50)) == 50
    with pytest.raises(ValueError, match="must be at least 1"):
        order(0, 0, 0, 4)


# --------------------------------------------------------------------------------------------- scenes


def test_scenes_are_those_of_image_at() -> None:
    scenes = source("scenes", size=50)
    images = scenes.images([0, 41, 7])
    assert images.shape == (3, 64, 64, 3) and images.dtype == np.uint8
    for row, index in enumerate([0, 41, 7]):
        scene, image = image_at(index)
        assert np.array_equal(images[row], image) and scenes.captions[index] == scene.caption
    assert len(scenes.captions) == 50 and scenes.captions[-1] == image_at(49)[0].caption
    assert scenes.captions[2:4] == [image_at(2)[0].caption, image_at(3)[0].caption]
    assert source("scenes", size=4, resolution=32).images([0]).shape == (1, 32, 32, 3)
    assert scenes.describe() == "scenes: 50 images at 64x64, captions"


def test_partitions_of_scenes_are_disjoint_and_complete() -> None:
    parts = [source("scenes", size=11, partition=f"{k}/3") for k in (1, 2, 3)]
    assert sum(part.size for part in parts) == 11 and all(part.size for part in parts)
    whole = source("scenes", size=11)
    assert sorted(caption for part in parts for caption in part.captions) == sorted(whole.captions)
    kept = parts[1].size
    assert parts[1].counts == {"kept": kept, "in other partitions": 11 - kept}
    # The pictures are those of the captions.
    for part in parts:
        index = list(whole.captions).index(part.captions[0])
        assert np.array_equal(part.images([0]), whole.images([index]))
    assert len({part.fingerprint() for part in parts}) == 3


def test_the_scenes_of_the_evaluation_cannot_be_trained_on() -> None:
    with pytest.raises(UserError, match=r"data\.seed must be 0 or more and not the evaluation's 1000003"):
        source("scenes", seed=1_000_003)


# ---------------------------------------------------------------------------------------- toy, prompts


def test_toy_has_no_images() -> None:
    toy = source("toy", size=10)
    assert toy.size == 10 and not toy.has_images and toy.captions is None
    with pytest.raises(UserError, match="the data source toy has no images"):
        toy.images([0])


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  a dog \n\t\n", encoding="utf-8")
    prompts = source("prompts", path=tmp_path / "p.txt")
    assert prompts.captions == ["a cat", "a dog"] and prompts.counts == {"kept": 2, "blank line": 2}
    assert prompts.describe() == f"prompts {tmp_path}/p.txt: 2 examples, captions; left out: 2 blank line"
    lines = ['{"text": "a"}', '{"prompt": "b"}', "", "{bad", '{"text": "  "}', "[1]"]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    prompts = source("prompts", path=tmp_path / "p.jsonl")
    assert prompts.captions == ["a", "b"]
    assert prompts.counts == {"kept": 2, "blank line": 1, "line without a prompt": 3}
    assert source("prompts", path=tmp_path / "p.jsonl", partition="2/2").captions == ["b"]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"holds no prompts \(2 blank line\)"):
        source("prompts", path=tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        source("prompts", path=tmp_path / "latin.txt")
    with pytest.raises(UserError, match=r"p\.text does not exist\. Did you mean 'p\.txt'\?"):
        source("prompts", path=tmp_path / "p.text")
    with pytest.raises(UserError, match="must be a file"):
        source("prompts", path=tmp_path)


# --------------------------------------------------------------------------------------------- folder


def test_folder_counts_what_it_drops(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["b.png", "a.png", "sub/c.webp", "nocap.png", "small.png"]):
        size = 4 if name == "small.png" else 16
        Image.fromarray(noise(i, size, size)).save(tmp_path / name, lossless=True)
        if name != "nocap.png":
            (tmp_path / name).with_suffix(".txt").write_text(f"caption  of {name} \n\n")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "broken.txt").write_text("x")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "._a.png").write_text("resource fork")
    folder = source("folder", path=tmp_path, resolution=16, min_size=8)
    assert folder.captions == ["caption of a.png", "caption of b.png", "caption of sub/c.webp"]
    assert folder.counts == {"kept": 3, "no caption": 1, "unreadable image": 2, "too small": 1}
    assert np.array_equal(folder.images([1, 0, 2]), np.stack([noise(0), noise(1), noise(2)]))
    assert folder.labels is None
    assert folder.describe().endswith(
        "3 images at 16x16, captions; left out: 1 no caption, 2 unreadable image, 1 too small"
    )


def test_folder_labels_and_class_partition(tmp_path: Path) -> None:
    for i, name in enumerate(["dog/1.png", "ant/2.png", "cat/deep/3.png", "cat/4.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i)).save(tmp_path / name)
    folder = source("folder", path=tmp_path, resolution=16)
    assert folder.class_names == ("ant", "cat", "dog") and folder.labels == [0, 1, 1, 2]
    assert folder.captions is None
    first = source("folder", path=tmp_path, resolution=16, partition="1/2")
    second = source("folder", path=tmp_path, resolution=16, partition="2/2")
    # Blocks of classes, numbered as in the whole.
    assert first.labels == [0] and second.labels == [1, 1, 2]
    assert second.class_names == folder.class_names
    assert np.array_equal(
        np.concatenate([first.images([0]), second.images(range(3))]), folder.images(range(4))
    )
    with pytest.raises(UserError, match=r"data\.partition=1/4 asks for 4 parts, but there are only 3"):
        source("folder", path=tmp_path, partition="1/4")


def test_folder_metadata(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for i, name in enumerate(["d/1.png", "d/2.png"]):
        Image.fromarray(noise(i)).save(tmp_path / name)
    entries = [
        {"file_name": "1.png", "text": "one"},
        {"file_name": "gone.png", "text": "x"},
        {"text": "lost"},
    ]
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    folder = source("folder", path=tmp_path, resolution=16)
    assert folder.captions == ["one"]
    assert folder.counts == {
        "kept": 1, "no caption": 1, "missing file": 1, "metadata line without a file_name": 1
    }  # fmt: skip


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.png, \.jpg or \.webp file"):
        source("folder", path=tmp_path)
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"holds no usable image \(1 unreadable image\)"):
        source("folder", path=tmp_path)
    with pytest.raises(UserError, match="must be a folder"):
        source("folder", path=tmp_path / "x.png")


def test_fingerprint_follows_content_and_settings_only(tmp_path: Path) -> None:
    for where in ("one", "two"):
        (tmp_path / where).mkdir()
        for i in range(3):
            Image.fromarray(noise(i)).save(tmp_path / where / f"{i}.png")
    first = source("folder", path=tmp_path / "one").fingerprint()
    assert source("folder", path=tmp_path / "two").fingerprint() == first
    assert source("folder", path=tmp_path / "two", memory_gb=0).fingerprint() == first
    assert source("folder", path=tmp_path / "two", resolution=32).fingerprint() != first
    Image.fromarray(noise(9)).save(tmp_path / "two" / "1.png")
    assert source("folder", path=tmp_path / "two").fingerprint() != first


# -------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("memory_gb", [2.0, 0.0])
def test_parquet(tmp_path: Path, memory_gb: float) -> None:
    images = [{"bytes": encoded(noise(i)), "path": None} for i in range(10)]
    images[3] = {"bytes": b"\xff\xd8 broken", "path": None}
    images[6] = {"bytes": None, "path": "elsewhere.png"}
    texts = [f"text {i}" for i in range(10)]
    texts[8] = " "
    write_parquet(tmp_path / "a.parquet", 10, list(range(5)) * 2, image=images, text=texts)
    parquet = source("parquet", path=tmp_path / "a.parquet", resolution=16, memory_gb=memory_gb)
    kept = [0, 1, 2, 4, 5, 7, 9]
    assert parquet.counts == {"kept": 7, "no caption": 1, "unreadable image": 1, "no image bytes": 1}
    assert parquet.captions == [f"text {i}" for i in kept] and parquet.labels == [i % 5 for i in kept]
    assert parquet.class_names == ("0", "1", "2", "3", "4")
    shuffled = [6, 0, 3, 3, 1]
    assert np.array_equal(parquet.images(shuffled), np.stack([noise(kept[i]) for i in shuffled]))
    first = source(
        "parquet", path=tmp_path / "a.parquet", resolution=16, partition="1/2", memory_gb=memory_gb
    )
    assert first.labels == [0, 1, 0] and np.array_equal(first.images([2])[0], noise(5))


def test_parquet_folder_names_and_string_labels(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [encoded(noise(0)), encoded(noise(1))], "label": [1, -1]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "0.parquet"
    )
    parquet = source("parquet", path=tmp_path, resolution=16)
    assert parquet.class_names == ("cat", "dog") and parquet.labels == [1]
    assert parquet.counts == {"kept": 1, "no label": 1}
    write_parquet(tmp_path / "1.parquet", 2, [0, 1])
    assert source("parquet", path=tmp_path, resolution=16).labels == [1, 0, 1]
    (tmp_path / "s").mkdir()
    write_parquet(tmp_path / "s" / "0.parquet", 3, ["b", "a", None])
    strings = source("parquet", path=tmp_path / "s", resolution=16)
    assert strings.class_names == ("a", "b") and strings.labels == [1, 0]


def test_parquet_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is not a Parquet file"):
        source("parquet", path=tmp_path / "bad.parquet")
    write_parquet(tmp_path / "a.parquet", 2, [0, 5], text=["x", "y"])
    with pytest.raises(UserError, match=r"data\.caption_column=txt is no column; .* Did you mean 'text'\?"):
        source("parquet", path=tmp_path / "a.parquet", caption_column="txt")
    with pytest.raises(UserError, match=r"data\.class_names has 2 names, but the labels in label reach 5"):
        source("parquet", path=tmp_path / "a.parquet", class_names=["a", "b"])
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"no column image or img; set data\.image_column to one of picture"):
        source("parquet", path=tmp_path / "b.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no \.parquet file"):
        source("parquet", path=tmp_path / "none")


def test_images_of_any_shape(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(noise(i, 18, 12)).save(tmp_path / f"{i}.png")
    tall = source("folder", path=str(tmp_path), resolution=[18, 12])
    assert tall.image_size == (18, 12) and "3 images at 18x12" in tall.describe()
    assert np.array_equal(tall.images([0, 2]), np.stack([noise(0, 18, 12), noise(2, 18, 12)]))
    assert tall.fingerprint() != source("folder", path=str(tmp_path), resolution=[12, 18]).fingerprint()
    with pytest.raises(UserError, match="resolution must be at least 8"):
        source("folder", path=str(tmp_path), resolution=[18, 4])
