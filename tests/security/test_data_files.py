"""No file that is handed in as data makes a run wait, fill the memory or end in a traceback."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from canaries import refusal
from examples import encoded, noise, source
from PIL import Image

from stepdistill import untrusted
from stepdistill.errors import UserError
from stepdistill.untrusted import opened_image, read_regular


def peak() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def folder(path: Path) -> Path:
    path.mkdir()
    Image.fromarray(noise(0)).save(path / "a.png")
    return path


def test_pipes_and_devices_are_counted_and_never_read(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    os.mkfifo(data / "b.png")
    (data / "zero.png").symlink_to("/dev/zero")
    (data / "gone.png").symlink_to(tmp_path / "nowhere")
    assert source("folder", path=data).counts == {
        "kept": 1, "unreadable file (it is no regular file)": 2, "missing file": 1
    }  # fmt: skip
    for name in ("a.txt", "metadata.jsonl", "metadata.csv"):
        os.mkfifo(data / name)
        assert "cannot be read (it is no regular file)" in refusal(source, "folder", path=data)
        (data / name).unlink()
    for name, kind in (("x.parquet", "parquet"), ("x.tar", "webdataset"), ("x.txt", "prompts")):
        os.mkfifo(tmp_path / name)
        assert "is a pipe or a device" in refusal(source, kind, path=tmp_path / name)
    assert "holds no .tar file" in refusal(source, "webdataset", path=tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="it has more than 256 MiB"):
        read_regular(tmp_path / "sparse.png")
    data = folder(tmp_path / "data")
    (tmp_path / "sparse.png").rename(data / "sparse.png")
    assert source("folder", path=data).counts["unreadable file (it has more than 256 MiB)"] == 1
    (data / "a.txt").write_text("x" * (2 << 20))
    assert "a.txt cannot be read (it has more than 1 MiB)" in refusal(source, "folder", path=data)


def test_large_images_are_decoded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pixels at a time as one image may have, whatever threads there are."""
    monkeypatch.setattr(untrusted, "_decoding", untrusted._Budget(300))
    held, most, small = [0], [0], encoded(noise(0, 10, 12))

    def work() -> None:
        with opened_image(small):
            held[0] += 1
            most[0] = max(most[0], held[0])
            time.sleep(0.02)
            held[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 2


@pytest.mark.slow
def test_eight_small_files_of_large_images_take_no_gigabytes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (9459, 9459)).save(data / "0.png")
    for i in range(1, 8):
        shutil.copy(data / "0.png", data / f"{i}.png")
    before = peak()
    assert source("folder", path=data).size == 8
    assert peak() - before < 1 << 30


def test_parquet_files_that_hold_more_than_they_can_are_refused(tmp_path: Path) -> None:
    path, count, before = tmp_path / "x.parquet", 1_500_000, peak()
    rows = {"image": pa.nulls(count, pa.binary()), "text": pa.nulls(count, pa.string())}
    pq.write_table(pa.table(rows), path, compression="zstd", row_group_size=count)
    assert path.stat().st_size < 100_000
    assert "values in" in refusal(source, "parquet", path=path)
    # The same 8 MiB in every row, once in the file.
    zeros = pa.DictionaryArray.from_arrays(pa.array(np.zeros(60, np.int32)), pa.array([bytes(8 << 20)]))
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(60, np.int32)), pa.array(["x" * (8 << 20)]))
    pq.write_table(pa.table({"image": zeros, "text": text}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    assert "holds no usable image (60 unreadable image)" in refusal(source, "parquet", path=path)
    assert peak() - before < 300 << 20


def test_flipped_bits_of_a_parquet_file_are_a_sentence_or_counted(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.parquet", np.random.default_rng(0)
    rows = {"image": [encoded(noise(i, 4, 4)) for i in range(8)], "text": [["a", f"b {i}"] for i in range(8)]}
    pq.write_table(pa.table({**rows, "label": list(range(8))}), path, row_group_size=4)
    content = path.read_bytes()
    refused = 0
    # Most of them in the footer and the pages' headers, where they are understood.
    for at in [
        *rng.integers(8 * len(content), size=60),
        *(8 * len(content) - rng.integers(64, 8 * 1500, 60)),
    ]:
        harmed = bytearray(content)
        harmed[at // 8] ^= 1 << at % 8
        path.write_bytes(harmed)
        try:
            data = source("parquet", path=path, resolution=8, memory_gb=0)
            data.images(range(data.size))
        except UserError as error:
            refused += 1
            assert "data.path" in str(error) or "data." in str(error)
    assert refused > 10
