"""Examples streamed by the library `datasets`, or by what stands for it where it is not installed."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from canaries import refusal
from examples import encoded, source

from training.batches import Batches
from training.data import Source, Unreadable, streamed
from training.state import TrainState

# Rows of each file.
LENGTHS = (3, 7, 1, 5, 4)
COUNT = sum(LENGTHS)


class StandIn:
    """The part of the library that is called, by pyarrow."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self.table = table

    def load_dataset(self, kind: str, *, data_files: list[str], split: str, streaming: bool) -> StandIn:
        assert (split, streaming, len(data_files)) == ("train", True, 1)
        if kind == "parquet":
            return StandIn(pq.read_table(data_files[0]))
        return StandIn(pa.Table.from_pylist([json.loads(line) for line in open(data_files[0])]))

    def select_columns(self, columns: list[str]) -> StandIn:
        return StandIn(self.table.select(columns))

    def with_format(self, kind: str) -> StandIn:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Any:
        for first in range(0, len(self.table), batch_size):
            yield self.table.slice(first, batch_size)


@pytest.fixture(params=["stand-in", "datasets"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "datasets":
        pytest.importorskip("datasets")
    else:
        monkeypatch.setattr(streamed, "_library", StandIn)


def picture(number: int) -> bytes:
    return encoded(np.full((16, 20, 3), number, np.uint8))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Five of them: image `number` is of that brightness, and says so."""
    first = 0
    for file, rows in enumerate(LENGTHS):
        numbers = range(first, first + rows)
        images = [{"bytes": picture(number), "path": None} for number in numbers]
        texts = [[f"number {number}", f"{number} again"] for number in numbers]
        pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / f"{file}.parquet")
        first += rows
    return tmp_path


def test_examples_are_read_by_number_as_batches_ask_for_them(files):
    data = source("datasets", path=files, resolution=8, files=2)
    assert (data.size, data.has_images, data.image_size) == (COUNT, True, (8, 8))
    assert data.describe() == f"datasets {files}: {COUNT} images at 8x8, captions"
    assert data.images([5, 0, 19])[:, 0, 0, 0].tolist() == [5, 0, 19]
    assert data.sizes([5]).tolist() == [[16, 20, 0, 1, 8, 8]]
    assert [data.caption(5, use) for use in range(3)] == ["5 again", "number 5", "5 again"]
    assert data.captions[3] == "number 3" and len(list(data.all_captions())) == 2 * COUNT


def test_an_epoch_mixes_a_few_files_at_a_time_and_goes_on_from_anywhere(files):
    data = source("datasets", path=files, resolution=8, files=2)
    flat = data.order(3, COUNT, 0, 3 * COUNT)
    for epoch in range(3):
        assert sorted(flat[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))
    assert flat[:COUNT] != flat[COUNT : 2 * COUNT] and flat[:COUNT] != data.order(4, COUNT, 0, COUNT)
    for batch in (1, 7, 33):
        parts = [data.order(3, COUNT, first, batch) for first in range(0, 3 * COUNT, batch)]
        assert [index for part in parts for index in part][: 3 * COUNT] == flat
    of = np.repeat(range(len(LENGTHS)), LENGTHS)
    seen = [of[index] for index in flat[:COUNT]]
    # No file is begun before those of the window before are through.
    opened = [set(seen[: i + 1]) - set(seen[i + 1 :]) for i in range(COUNT)]
    begun = [set(seen[: i + 1]) - through for i, through in enumerate(opened)]
    assert max(map(len, begun)) == 2 and len(set(seen[:4])) > 1
    data.images(flat[:COUNT])
    assert len(data._held) == 4


def test_batches_follow_the_order_of_their_source(files):
    data = source("datasets", path=files, resolution=8, files=2)
    family = SimpleNamespace(shape=(3, 8, 8))
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    batches = Batches(family, data, alone, (4, 1), needs_images=True)
    asked: list[int] = []
    batches._batch = lambda examples, *rest: asked.extend(examples) or SimpleNamespace()
    state = TrainState(0)
    for _ in range(7):
        list(batches.draw("student", state))
    assert asked == data.order(0, COUNT, 0, 28) != Source.order(data, 0, COUNT, 0, 28)


def test_what_cannot_be_read_is_named_and_paths_in_files_lead_nowhere(files, tmp_path):
    rows = [{"bytes": None, "path": str(files / "0.parquet")}, {"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": rows, "text": ["a", "b"]}), tmp_path / "0.parquet")
    data = source("datasets", path=tmp_path, resolution=8)
    for index, why in ((0, "no image bytes"), (1, "unreadable image")):
        with pytest.raises(Unreadable, match=why) as error:
            data.images([index])
        assert error.value.index == index
    assert source("datasets", path=tmp_path).fingerprint() != data.fingerprint()
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and no more")
    assert "1.parquet is not a Parquet file" in refusal(source, "datasets", path=tmp_path)
    (tmp_path / "1.parquet").rename(tmp_path / "1*.parquet")
    assert "rename it" in refusal(source, "datasets", path=tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert "files of one kind" in refusal(source, "datasets", path=tmp_path)


def test_json_files_hold_prompts(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p {i}", "n": i}) + "\n" for i in range(9))
    )
    data = source("datasets", path=tmp_path)
    assert (data.size, data.has_images, data.caption(4)) == (9, False, "p 4")
    assert "has no images" in refusal(data.images, [0])
    assert "data.caption_column=propmt is no column" in refusal(
        source, "datasets", path=tmp_path, caption_column="propmt"
    )


def test_without_the_library_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.undo()
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'stepdistill[datasets]'" in refusal(source, "datasets", path=tmp_path)
