"""Images and references in files: what is read, what is refused by name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from fakes import encoded, pictures, save_images
from PIL import Image
from torch import nn

from evaluation.decoding import decode
from evaluation.extractors import load_extractor
from evaluation.files import open_images
from evaluation.protocol import PROTOCOLS, get_protocol, real_images
from evaluation.reference import reference_stats
from evaluation.references import FileReference, SceneReference
from stepdistill import scenes
from stepdistill.errors import UserError


def test_folder_and_parquet_give_the_same_images(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pictures(0, 70)
    save_images(tmp_path / "folder", images)
    files = sorted((tmp_path / "folder").iterdir())
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"image": cells, "label": list(range(70))})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=20)
    for path in (tmp_path / "folder", tmp_path / "data.parquet"):
        opened = open_images(path)
        assert len(opened) == 70 and torch.equal(torch.cat(list(opened)), images)
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="columns pixels; one named image or img"):
        open_images(tmp_path / "other.parquet")


def test_lossless_formats_are_turned_into_rgb() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for image in (grey, grey.convert("RGBA"), grey.convert("LA"), grey.convert("P"), grey.convert("RGB")):
        found = decode(encoded(image), "x").pixels
        assert found.shape == (8, 8, 3) and np.array_equal(found[:, :, 0], np.asarray(grey))


def deep_png(channels: int) -> bytes:
    """A PNG of 8 x 8 pixels with 16 bits a channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 8, 8, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x12\x34" * 8 * channels) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_that_cannot_be_used(tmp_path) -> None:
    clear = Image.new("RGBA", (8, 8), (1, 2, 3, 100))
    with pytest.raises(UserError, match="x has transparent pixels"):
        decode(encoded(clear), "x")
    with pytest.raises(UserError, match="x has 16 bits a channel"):
        decode(encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "x")
    # Pillow opens these as 8-bit RGB and RGBA.
    for channels in (3, 4):
        with pytest.raises(UserError, match="x has 16 bits a channel"):
            decode(deep_png(channels), "x")
    with pytest.raises(UserError, match=r"cannot be read as an image \(it is none of PNG, JPEG, WEBP, BMP"):
        decode(b"hello", "x")
    with pytest.raises(UserError, match="cannot be read as an image"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        decode(encoded(Image.fromarray(noise))[:900], "x")
    with pytest.raises(UserError, match="there is nothing at"):
        open_images(tmp_path / "missing")
    with pytest.raises(UserError, match="there is no image"):
        open_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png is 9x8 but .*a\.png is 8x8"):
        list(open_images(tmp_path))


def test_extractor_from_a_directory(tmp_path) -> None:
    from evaluation.feature_net import FeatureNet

    torch.manual_seed(0)
    net = FeatureNet("mine", 32, 16, {"label": ["a", "b"]})
    net.save(tmp_path / "net")
    first = load_extractor(tmp_path / "net")
    images = pictures(0, 5)
    assert (first.name, first.dim) == ("mine", 16) and "32" in first.resize
    torch.testing.assert_close(first(images), FeatureNet.load(tmp_path / "net")(images), rtol=0, atol=1e-5)
    with torch.no_grad():
        nn.init.ones_(net.head.weight)
    net.save(tmp_path / "net")
    assert load_extractor(tmp_path / "net").sha256 != first.sha256
    with pytest.raises(UserError, match=r"no extractor 'scenes-v2'.*Did you mean 'scenes-v1'"):
        load_extractor("scenes-v2")


def test_real_images_are_known_by_content(tmp_path) -> None:
    save_images(tmp_path / "a", pictures(0, 3))
    save_images(tmp_path / "b" / "a", pictures(0, 3))
    one, other = real_images(tmp_path / "a", classes=10), real_images(tmp_path / "b" / "a", classes=10)
    assert one.hash == other.hash and one.hash != real_images(tmp_path / "a").hash


def test_changed_pixels_are_another_reference(tmp_path) -> None:
    save_images(tmp_path, pictures(0, 3))
    before = FileReference.open(tmp_path)
    changed = pictures(0, 3)
    changed[1, 0, 0, 0] ^= 1
    save_images(tmp_path, changed)
    assert FileReference.open(tmp_path).sha256() != before.sha256()


def test_reference_statistics_are_kept_and_made_again_when_damaged(tmp_path, monkeypatch, extractor) -> None:
    from dataclasses import replace

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=110))
    stats = reference_stats(protocol, extractor)
    (kept,) = (tmp_path / "statistics").iterdir()
    assert protocol.hash in kept.name and stats.n == 110
    monkeypatch.setattr(SceneReference, "__iter__", lambda self: pytest.fail("the cache was not used"))
    assert np.array_equal(reference_stats(protocol, extractor).cov, stats.cov)
    monkeypatch.undo()
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    kept.write_bytes(b"half a file")
    assert np.array_equal(reference_stats(protocol, extractor).cov, stats.cov)


def test_protocol_hash_covers_what_changes_a_number() -> None:
    from dataclasses import replace

    protocol = get_protocol("scenes-2k")
    assert protocol.hash == "e91ba17ff0c64669"
    assert replace(protocol, about="other words").hash == protocol.hash
    for change in ({"n": 1000}, {"first_seed": 5}, {"reference": SceneReference(first=0)}, {"version": 2}):
        assert replace(protocol, **change).hash != protocol.hash


def test_scenes_2k_asks_for_scenes_its_reference_has_not() -> None:
    protocol = PROTOCOLS["scenes-2k"]
    assert protocol.prompts(3) == [scenes.scene_at(index, 1_000_003).caption for index in range(3)]
    assert protocol.seeds(3) == [0, 1, 2]
    assert (protocol.label(2000), protocol.label(500)) == ("scenes-2k", "scenes-2k[n=500]")
    assert protocol.reference.first >= protocol.n and len(protocol.reference) == 4000
    first = next(iter(protocol.reference))[0]
    assert np.array_equal(first.permute(1, 2, 0).numpy(), scenes.image_at(10_000, 1_000_003)[1])
