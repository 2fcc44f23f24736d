"""Decoding ahead: in order, bounded, with the failure of the right image; and what a pass finds out."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import decoding
from evaluation.decoding import Resize
from evaluation.facts import Facts
from evaluation.files import open_images
from evaluation.images import MemoryImages, ResizedImages, Watched
from stepdistill.errors import UserError


def folder(path: Path, count: int, **odd: Image.Image) -> Path:
    """Files 000.png .. with their number in every pixel, and others by name."""
    path.mkdir()
    for index in range(count):
        Image.new("RGB", (6, 4), (index, index, index)).save(path / f"{index:03d}.png")
    for name, image in odd.items():
        image.save(path / name.replace("_", "."))
    return path


@pytest.mark.parametrize("io_batch", [1, 7, 64])
def test_files_come_in_order_for_every_io_batch(tmp_path, io_batch: int) -> None:
    found = open_images(folder(tmp_path / "a", 100), io_batch=io_batch)
    for _ in range(2):
        assert torch.cat(list(found))[:, 0, 0, 0].tolist() == list(range(100))
    assert found.facts.n == 100 and found.facts.size == (6, 4)


def test_only_so_many_jobs_are_ahead_of_the_caller() -> None:
    begun, lock = [], threading.Lock()

    def work(group: list[int]) -> list[int]:
        with lock:
            begun.extend(group)
        return group

    taken = []
    for group in decoding.ahead(iter(range(1000)), work, 5, workers=3):
        taken.extend(group)
        with lock:
            assert len(begun) <= len(taken) + 5 * decoding.JOBS
    assert taken == list(range(1000))


def test_leaving_early_ends_the_threads(tmp_path) -> None:
    before = threading.active_count()
    batches = iter(open_images(folder(tmp_path / "a", 200), io_batch=2))
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_images_before_a_broken_one_come_first(tmp_path) -> None:
    place = folder(tmp_path / "a", 20)
    (place / "011.png").write_bytes((place / "011.png").read_bytes()[:40])
    seen = 0
    with pytest.raises(UserError, match=r"011\.png cannot be read as an image"):
        for batch in open_images(place, io_batch=4):
            seen += len(batch)
    assert seen == 8


def test_what_a_pass_finds_out(tmp_path) -> None:
    grey, picture = Image.new("L", (6, 4), 200), Image.new("RGB", (6, 4), (3, 3, 3))
    found = open_images(folder(tmp_path / "a", 5, g_png=grey, j_jpg=grey, same_png=picture))
    assert found.facts is None
    list(found)
    facts = found.facts
    # The two greys, and number 3.
    assert (facts.n, facts.traits, facts.duplicates) == (8, {"grey": 2, "lossy": 1}, 2)
    next(iter(found))
    # An unfinished pass says nothing.
    assert found.facts is facts


def test_facts_of_any_set() -> None:
    batch = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    one, other = Watched(MemoryImages([batch])), Watched(MemoryImages([batch[2:], batch[3:4]]))
    assert torch.equal(torch.cat(list(one)), batch) and len(list(other)) == 2
    assert (one.facts.duplicates, other.facts.duplicates) == (0, 1)
    assert one.facts.shared_with(other.facts) == 3 and Facts().shared_with(one.facts) == 0


def test_sets_are_resized_like_files(tmp_path) -> None:
    place = tmp_path / "a"
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(place / f"{index}.png")
    resize = Resize("centre", 8, "bicubic")
    in_memory = ResizedImages(MemoryImages([torch.from_numpy(pixels).permute(0, 3, 1, 2)]), resize)
    assert torch.equal(torch.cat(list(in_memory)), torch.cat(list(open_images(place, resize))))


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UserError, match=r"bomb cannot be read as an image \(it has more than 1,000 pix"),
    ):
        decoding.decode(buffer.getvalue(), "bomb")
