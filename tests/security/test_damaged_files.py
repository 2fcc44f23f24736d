"""Files that are damaged or say nonsense are one sentence, whatever the library that reads them raises."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from canaries import refusal
from examples import encoded, noise

from app import runs
from evaluation import compare
from evaluation.files import open_images
from stepdistill import assets, routing
from stepdistill.clip import Clip

RESULTS = Path(__file__).resolve().parents[2] / "assets/results/results.json"


def flipped(content: bytes, at: int) -> bytes:
    harmed = bytearray(content)
    harmed[at] ^= 0xFF
    return bytes(harmed)


def read_images(path: Path) -> None:
    for _ in open_images(path):
        pass


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.png", encoded(noise(0)))
    return buffer.getvalue()


def test_a_damaged_archive_table_or_array_is_one_sentence(tmp_path: Path) -> None:
    content = archive()
    directory = content.index(b"PK\x01\x02")
    # A pixel, the file's own header, its name there, how it is packed, that it is locked.
    for at in (200, 0, 30, directory + 10, directory + 8):
        (tmp_path / "x.zip").write_bytes(flipped(content, at))
        assert "cannot be read as" in refusal(read_images, tmp_path / "x.zip")
    pq.write_table(pa.table({"image": [encoded(noise(i, 4, 4)) for i in range(8)]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content[:4] + b"\0" * 60 + content[64:])
    assert "cannot be read as" in refusal(read_images, tmp_path / "x.parquet")
    np.save(tmp_path / "x.npy", np.stack([noise(0), noise(1)]))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content.replace(b"'descr'", b"('descr"))
    assert "is no NumPy array" in refusal(read_images, tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(content.replace(b"(2, 16, 16, 3)", b"(9, 9**9,9, 3)"))
    refusal(read_images, tmp_path / "x.npy")


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": "x"},
        {"protocol_hash": {}},
        {"rows": [1]},
        {"rows": [{"name": "x"}]},
        {"rows": [{"name": "x", "role": [], "steps": {}, "guidance": "a", "nfe": 1, "n": [], "metrics": 3}]},
    ],
)
def test_results_that_no_run_writes_are_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(json.loads(RESULTS.read_text()) | change))
    loaded = [compare.load(tmp_path)] * 2
    assert "cannot be read as results" in refusal(compare.text, loaded)


def test_a_run_whose_recipe_is_nonsense_is_still_listed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "student/total": 0.5}\n' + "[" * 100_000 + "\n")
    for recipe in ("run: 3\nmethod: true", "stages: {a: 1}", "run: []\nstages: 7", "stages: [1, {run: 2}]"):
        (tmp_path / "recipe.yaml").write_text(recipe)
        (found,) = runs.read([tmp_path])
        assert found["step"] == 1


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"by": "prompt"},
        {"by": "prompt", "centroids": [[None] * routing.WIDTH]},
        {"by": "prompt", "centroids": [[1.0]]},
        {"by": "class", "blocks": [[2, 1]]},
        {"by": "class", "blocks": 3},
    ],
)
def test_a_routing_that_is_none_is_one_sentence(said: dict[str, Any]) -> None:
    assert "its routing is neither" in refusal(routing.router, said)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "model_max_length", -3),
        ("tokenizer_config.json", "model_max_length", 1.5),
        ("tokenizer.json", "added_tokens", [{"id": 1}]),
        ("tokenizer.json", "normalizer", "x"),
        ("preprocessor_config.json", "image_mean", [[None]]),
    ],
)
def test_a_clip_model_of_nonsense_is_one_sentence(file: str, key: str, value: Any, tmp_path: Path) -> None:
    shutil.copytree(assets.path("clip"), tmp_path / "clip")
    path = tmp_path / "clip" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refusal(Clip, str(tmp_path / "clip"))
