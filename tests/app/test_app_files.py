"""Files that carry their settings: what goes in comes out, and hostile ones cost nothing."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest

from app import png
from app.request import Limits, Request, validate
from app.result import Result
from app.settings import from_settings
from stepdistill.errors import UserError

LIMITS = {"student": Limits(steps=(1, 2, 4))}
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def result(**fields):
    request = validate(Request("a red circle [[[[[[ \u00e9", seed=3, steps=2), LIMITS)
    seconds = {"text": 0.001, "denoise": 0.01, "decode": 0.009}
    return Result(
        request, IMAGE, "s", seconds, about={"dtype": "float32", "nested": {"not": "kept"}, **fields}
    )


def test_a_png_gives_back_its_pixels_and_settings():
    made = result()
    pixels, text = png.read_png(made.png())
    assert np.array_equal(pixels, IMAGE)
    assert from_settings(text, LIMITS) == made.request
    assert json.loads(text)["about"] == {"dtype": "float32"}
    assert png.read_png(made.png(embed=False))[1] is None


def test_other_programs_find_the_settings_in_the_line_they_know():
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(result(sha256="ab" * 32).png())) as image:
        line = image.text["parameters"]
    assert line.splitlines() == [
        "a red circle [[[[[[ \u00e9",
        "Steps: 2, CFG scale: 1.0, Seed: 3, Size: 64x64, Model hash: ababababab, Model: s",
    ]
    guided = png.parameters({"prompt": "a", "negative_prompt": "b", "seed": 1})
    assert guided == "a\nNegative prompt: b\nSeed: 1"


def test_a_png_without_settings():
    assert png.read_png(png.write_png(IMAGE))[1] is None


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "nonsense",
        '{"version": 99}',
        '{"version": 1, "prompt": "x", "steps": 9999}',
        '{"version": 1, "prompt": "x", "steps": NaN}',
        '{"version": 1, "prompt": "x", "model": "../../x"}',
        '{"version": 1, "prompt": {"a": 1}}',
        "[" * 8000,
        '{"a":' * 3000,
        '{"version": 1, "prompt": "' + "x" * 20_000 + '"}',
    ],
)
def test_forged_settings_are_refused(text):
    with pytest.raises(UserError) as caught:
        from_settings(text, LIMITS)
    assert len(str(caught.value)) < 300


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(extra):
    data = png.write_png(IMAGE)
    return data[:33] + extra + data[33:]


def test_hostile_files_are_refused_before_they_cost_anything():
    bomb = with_chunk(b"")
    bomb = bomb[:16] + struct.pack(">II", 50_000, 50_000) + bomb[24:]
    long = with_chunk(chunk(b"tEXt", b"stepdistill\0" + b"x" * 20_000))
    for data, why in [
        (b"", "not a PNG"),
        (b"<svg onload=alert(1)>", "not a PNG"),
        (b"\xff\xd8\xff" + b"0" * 100, "not a PNG"),
        (bomb, "50000x50000"),
        (png.write_png(IMAGE)[:200], "damaged or cut off.$"),
        (long, "20000 bytes"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * png.MAX_FILE, "bytes"),
    ]:
        with pytest.raises(UserError, match=why):
            png.read_png(data)


def test_compressed_text_is_never_inflated():
    inflated = zlib.compress(b"0" * 50_000_000)
    data = with_chunk(
        chunk(b"zTXt", b"stepdistill\0\0" + inflated) + chunk(b"iTXt", b"stepdistill\0\1\0\0\0" + inflated)
    )
    pixels, text = png.read_png(data)
    assert text is None and np.array_equal(pixels, IMAGE)
