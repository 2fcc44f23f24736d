"""An encoded image becomes the central square of its upright RGB pixels, or a reason why it cannot."""

from __future__ import annotations

import io

import numpy as np
import pytest
from examples import encoded, noise
from PIL import Image

from stepdistill import untrusted
from training.data.decoding import decoded


def pixels(raw: bytes, size: int | tuple[int, int]) -> np.ndarray:
    return decoded(raw, [(size, size) if isinstance(size, int) else size]).pixels


def test_greyscale_transparency_and_16_bit_become_rgb() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(encoded(grey), 16), rgb)
    assert np.array_equal(pixels(encoded(grey.astype(np.uint16) * 257), 16), rgb)
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8] = (10, 20, 30, 255)
    laid = pixels(encoded(clear), 16)
    assert (laid[:8] == (10, 20, 30)).all() and (laid[8:] == 255).all()
    palette = Image.fromarray(rgb).quantize(8)
    assert np.array_equal(pixels(encoded(palette), 16), np.asarray(palette.convert("RGB")))
    assert pixels(encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG"), 16).shape == (16, 16, 3)


def test_images_are_cut_to_the_centre_and_resized() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = noise(1, 8, 8)
    wide[:, :8], wide[:, 16:] = 255, 255
    assert np.array_equal(pixels(encoded(wide), 8), wide[:, 8:16])
    expected = Image.fromarray(noise(2, 32, 32)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(encoded(noise(2, 32, 32)), 16), np.asarray(expected))


def test_images_are_cut_to_any_shape_about_their_centre() -> None:
    tall = np.full((40, 12, 3), 255, np.uint8)
    tall[11:29] = noise(1, 18, 12)
    assert np.array_equal(pixels(encoded(tall), (18, 12)), tall[11:29])
    expected = Image.fromarray(tall).resize((8, 12), Image.Resampling.LANCZOS, box=(0, 11, 12, 29))
    assert np.array_equal(pixels(encoded(tall), (12, 8)), np.asarray(expected))
    # As wide as it can be: what is too wide keeps its height.
    wide = np.concatenate([tall[11:29], np.zeros((18, 30, 3), np.uint8)], 1)
    assert np.array_equal(pixels(encoded(wide), (18, 12)), wide[:, 15:27])


def test_exif_orientation_is_applied() -> None:
    upright = noise(3)
    exif = Image.Exif()
    # Stored lying on its left side.
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(upright).copy()).save(buffer, "PNG", exif=exif)
    assert np.array_equal(pixels(buffer.getvalue(), 16), upright)


def test_decompression_bombs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "IMAGE_PIXELS", 20 * 20 - 1)
    assert decoded(encoded(noise(0, 20, 20)), [(16, 16)]) == "too large"
    monkeypatch.undo()
    huge = bytearray(encoded(noise(0)))
    # A header that promises 2.7 GB.
    huge[16:24] = (30_000).to_bytes(4, "big") * 2
    huge[29:33] = __import__("zlib").crc32(huge[12:29]).to_bytes(4, "big")
    assert decoded(bytes(huge), [(16, 16)]) == "too large"
