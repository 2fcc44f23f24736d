"""Pictures to draw from: bytes that a client uploaded, kept for its own session, and never a path or an address.

A request names a picture by the sha256 of its file. Only the session that uploaded it finds it, and files made from it
hold that name alone, never the picture. No torch here.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from app.png import MAX_FILE, MAX_PIXELS
from app.request import Invalid
from stepdistill.errors import UserError

# Formats by the first bytes of a file; WEBP's stand after its length.
KINDS = ((b"\x89PNG\r\n\x1a\n", 0, "PNG"), (b"\xff\xd8\xff", 0, "JPEG"), (b"WEBP", 8, "WEBP"))
# Pixels that a picture is kept at; a larger one is made smaller once, when it comes.
KEPT_PIXELS = 2**21
# Pictures of a session, and bytes of all; the oldest go.
PER_SESSION = 4
MAX_BYTES = 128 * 2**20


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture: the sha256 of its file, and pixels uint8 (H, W, 3), of at most `KEPT_PIXELS`."""

    sha256: str
    pixels: np.ndarray
    _fitted: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def fitted(self, resolution: tuple[int, int]) -> np.ndarray:
        """It at a model's (height, width), uint8 (H, W, 3): scaled to cover it, and what stands out cut off evenly."""
        if resolution not in self._fitted:
            size = resolution[1], resolution[0]
            fitted = ImageOps.fit(Image.fromarray(self.pixels), size, Image.Resampling.LANCZOS)
            self._fitted.clear()
            self._fitted[resolution] = np.asarray(fitted)
        return self._fitted[resolution]


def opened(data: bytes) -> Picture:
    """The picture in an uploaded file. For a thread: it decodes.

    Its kind is told by its first bytes and its size is read from its header, before anything is decoded. What it shows
    through is white.

    Raises:
        Invalid: it is no PNG, JPEG or WebP image, too large, or damaged.
    """
    try:
        return Picture(hashlib.sha256(data).hexdigest(), _pixels(data))
    except UserError as error:
        raise Invalid("image", str(error)) from None


def _pixels(data: bytes) -> np.ndarray:
    if len(data) > MAX_FILE:
        raise UserError(f"the picture has {len(data)} bytes, more than the {MAX_FILE} allowed.")
    kind = next((kind for magic, at, kind in KINDS if data.startswith(magic, at)), None)
    if kind is None:
        raise UserError("the file is no picture; give a PNG, JPEG or WebP image.")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise UserError(
                    f"the picture has {width}x{height} pixels, more than the {MAX_PIXELS} allowed."
                )
            whole = ImageOps.exif_transpose(image).convert("RGBA")
    except Image.DecompressionBombError:
        raise UserError(f"the picture has more than the {MAX_PIXELS} pixels allowed.") from None
    except (OSError, ValueError, SyntaxError):
        raise UserError("the picture is damaged or cut off.") from None
    flat = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    share = (KEPT_PIXELS / (width * height)) ** 0.5
    if share < 1:
        smaller = tuple(max(1, int(side * share)) for side in flat.size)
        flat = flat.resize(smaller, Image.Resampling.LANCZOS)
    return np.asarray(flat)


class Pictures:
    """The pictures of all sessions, bounded. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By session and sha256, the latest used last.
        self._kept: OrderedDict[tuple[str, str], Picture] = OrderedDict()

    def add(self, session: str, picture: Picture) -> None:
        """Keep a picture for a session; its oldest ones go where it has too many, and those of all where all have."""
        with self._lock:
            self._kept[session, picture.sha256] = picture
            self._kept.move_to_end((session, picture.sha256))
            own = [key for key in self._kept if key[0] == session]
            for key in own[:-PER_SESSION]:
                del self._kept[key]
            while sum(kept.pixels.nbytes for kept in self._kept.values()) > MAX_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)

    def get(self, session: str | None, sha256: str) -> Picture:
        """A picture of this session.

        Raises:
            Invalid: it has uploaded none of this name, or so long ago that it is kept no more.
        """
        with self._lock:
            picture = self._kept.get((session or "", sha256))
            if picture is None:
                raise Invalid(
                    "image",
                    f"this session has no picture of sha256 {sha256[:12]}...; upload it first (POST /api/picture).",
                )
            self._kept.move_to_end((session, sha256))
            return picture
