"""Captions in every form they come in, and several of one image: each is used in its turn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import encoded, noise, source
from PIL import Image

from stepdistill.errors import UserError
from training.data import Source


def images(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i)).save(folder / name)
    return folder


def used(data: Source, index: int, uses: int) -> Counter[str]:
    return Counter(data.caption(index, use) for use in range(uses))


def test_lines_of_a_text_are_used_in_turn(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("one\n\n two  words \nthree\n")
    (tmp_path / "b.txt").write_text("only")
    (tmp_path / "c.caption").write_text("left\nright")
    folder = source("folder", path=tmp_path)
    assert folder.captions == ["one", "only", "left"] and "1 to 3 captions each" in folder.describe()
    # After as many uses as there are texts, each has been used as often as the others.
    assert used(folder, 0, 6) == {"one": 2, "two words": 2, "three": 2}
    assert used(folder, 1, 3) == {"only": 3} and used(folder, 2, 4) == {"left": 2, "right": 2}
    assert sorted(folder.all_captions()) == sorted(["one", "two words", "three", "only", "left", "right"])
    before = folder.fingerprint()
    (tmp_path / "a.txt").write_text("one\ntwo words\nfour")
    assert source("folder", path=tmp_path).fingerprint() != before


def test_one_caption_each_is_the_plain_case(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"of {name}\n")
    folder = source("folder", path=tmp_path)
    assert folder.texts is None and [folder.caption(1, use) for use in range(3)] == ["of b"] * 3


def test_metadata_tables_and_lists(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "sub/c.png", "sub/d.png")
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,text\na.png,"commas, and ""quotes"""\na.png,again\nb.png,second\n', encoding="utf-8"
    )
    entries = [{"file_name": "c.png", "captions": ["x", " ", "y"]}, {"file_name": "d.png", "prompt": "z"}]
    entries.append({"file_name": "../../outside.png", "text": "never opened"})
    (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    folder = source("folder", path=tmp_path)
    assert folder.texts == [['commas, and "quotes"', "again"], ["second"], ["x", "y"], ["z"]]
    assert folder.counts == {"kept": 4, "missing file": 1}
    (tmp_path / "metadata.csv").write_text("name,text\na.png,x\n")
    with pytest.raises(UserError, match=r"metadata\.csv has the columns name, text; file_name is needed"):
        source("folder", path=tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000)
    with pytest.raises(UserError, match=r"metadata\.csv, line \d: no table"):
        source("folder", path=tmp_path)


def test_a_column_of_lists(tmp_path: Path) -> None:
    texts = [["a", "b"], ["c"], [], None, ["", "d"]]
    pq.write_table(
        pa.table({"image": [encoded(noise(i)) for i in range(5)], "captions": texts}), tmp_path / "x.parquet",
        row_group_size=2,
    )  # fmt: skip
    data = source("parquet", path=tmp_path / "x.parquet")
    assert data.texts == [["a", "b"], ["c"], ["d"]] and data.counts == {"kept": 3, "no caption": 2}
    assert used(data, 0, 4) == {"a": 2, "b": 2}


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    images(tmp_path / "data", "a.png")
    images(tmp_path / "elsewhere", "b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    # A linked file is an image like others: the hub's cache consists of them.
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    for name in ("one.gif", "two.gif", "three.tiff", "alone.txt"):
        (tmp_path / "data" / name).write_text("x")
    folder = source("folder", path=tmp_path / "data")
    assert folder.counts == {
        "kept": 2, "linked folder": 1, ".gif file": 2, ".tiff file": 1, "caption without an image": 1
    }  # fmt: skip
    assert "left out: 1 linked folder, 2 .gif file, 1 .tiff file" in folder.describe()
