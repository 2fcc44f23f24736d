"""PNG files that carry the settings of their image in the text chunk `KEY`, and, for other programs, in the line
that AUTOMATIC1111's web UI writes under "parameters".
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from app.settings import MAX_BYTES
from stepdistill.errors import UserError

KEY = "stepdistill"
PARAMETERS = "parameters"
# Pixels and bytes of a file that is read back.
MAX_PIXELS = 16_000_000
MAX_FILE = 8 * 1024 * 1024


def write_png(image: np.ndarray, values: Mapping[str, Any] | None = None) -> bytes:
    """PNG bytes of a uint8 (H, W, 3) image, with `values` as JSON in text chunk `KEY`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=png_info(values) if values else None, compress_level=1)
    return buffer.getvalue()


def png_info(values: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """The text chunks for `Image.save(pnginfo=...)`."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(values))
    line = parameters(values)
    # What is no Latin-1 needs the chunk of international text.
    (info.add_text if line.isascii() else info.add_itxt)(PARAMETERS, line)
    return info


def parameters(values: Mapping[str, Any]) -> str:
    """The settings as AUTOMATIC1111's web UI writes them: prompt, negative prompt, and one line of the rest."""
    lines = [str(values.get("prompt", ""))]
    if values.get("negative_prompt"):
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    about = values.get("about") or {}
    pairs = {
        "Steps": values.get("steps"),
        "CFG scale": values.get("guidance_scale"),
        "Seed": values.get("seed"),
        "Size": values.get("size"),
        "Model hash": str(about.get("sha256", ""))[:10] or None,
        "Model": values.get("made_by"),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def read_png(data: bytes) -> tuple[np.ndarray, str | None]:
    """Pixels, uint8 (H, W, 3), and the settings text of a PNG file, or None when it carries none.

    The size is read from the header before anything is decoded, and text chunks are walked by hand: Pillow
    would inflate a compressed one of any size first.

    Raises:
        UserError: not a PNG, too large, truncated, or its settings are too long.
    """
    if len(data) > MAX_FILE:
        raise UserError(f"the file has {len(data)} bytes, more than the {MAX_FILE} allowed.")
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 33 or data[12:16] != b"IHDR":
        raise UserError("the file is not a PNG image; drop an image that was downloaded from this page.")
    width, height = struct.unpack(">II", data[16:24])
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"the image has {width}x{height} pixels, more than the {MAX_PIXELS} allowed.")
    text, kept = _text_chunk(data)
    try:
        with Image.open(io.BytesIO(kept), formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        raise UserError("the PNG file is damaged or cut off.") from None
    return pixels, text


def _text_chunk(data: bytes) -> tuple[str | None, bytes]:
    """The text of chunk `KEY`, and the file without any text chunk."""
    text, kept, at = None, [data[:8]], 8
    while at + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, value = body.partition(b"\0")
            if kind == b"tEXt" and keyword == KEY.encode() and text is None:
                if len(value) > MAX_BYTES:
                    raise UserError(
                        f"the file's settings have {len(value)} bytes, more than the {MAX_BYTES} allowed."
                    )
                text = value.decode("latin-1")
        else:
            kept.append(data[at : at + 12 + size])
        at += 12 + size
    return text, b"".join(kept)
