"""One encoded image to pixels: what is taken, what is refused, how it is cropped and resized, and in which threads.

What is lossless to turn into RGB is turned (greyscale, palette, an opaque alpha channel); everything else is
refused by name, because a silent repair would change the number that is measured.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stepdistill.errors import UserError
from stepdistill.untrusted import IMAGES

# Pillow's names; all of them antialias.
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# Groups of images under way or waiting to be taken, at most.
JOBS = 4


@dataclass(frozen=True)
class Resize:
    """What is done to every image of a set before anything is measured, in uint8 throughout.

    crop: "none", "centre": the largest square in the middle, or "window": the `size` pixels in the middle,
    after which nothing is left to resize. size: side of the square result; 0 leaves images as they are.
    filter: one of Pillow's, which all antialias.
    """

    crop: str = "none"
    size: int = 0
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        if self.crop not in ("none", "centre", "window") or self.filter not in FILTERS or self.size < 0:
            raise UserError(
                f"resize needs a crop of none or centre, a size of 0 or more and a filter among "
                f"{', '.join(FILTERS)}; got {self.crop!r}, {self.size} and {self.filter!r}."
            )

    def __bool__(self) -> bool:
        return self.crop != "none" or self.size > 0

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crop, then resize."""
        if self.crop != "none":
            side = min(image.size) if self.crop == "centre" else self.size
            if side > min(image.size):
                raise UserError(
                    f"a window of {side}x{side} is larger than an image of {image.width}x{image.height}."
                )
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.size and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling[self.filter.upper()])
        return image


AS_STORED = Resize()


def patch_window(side: int) -> Resize:
    """What brings images of any sizes to one around a centre patch of this side, which stays the centre."""
    return Resize("window", side + 2)


@dataclass(frozen=True)
class Decoded:
    """pixels: uint8 (H, W, 3). lossy: stored as JPEG. grey: stored without colour. hash: of the pixels."""

    name: str
    pixels: np.ndarray
    lossy: bool
    grey: bool
    hash: int


def decode(content: bytes, name: str, resize: Resize = AS_STORED) -> Decoded:
    """One encoded image; `name` is what messages call it.

    Raises:
        UserError: it is damaged, far too large, or not 8-bit greyscale, palette, RGB or opaque RGBA.
    """
    image, form, grey = _opened(content, name)
    pixels = np.asarray(resize(image))
    return Decoded(name, pixels, form == "JPEG", grey, pixel_hash(pixels))


def _opened(content: bytes, name: str) -> tuple[Image.Image, str, bool]:
    """The image as RGB, the format it was stored in, and whether that was without colour."""
    try:
        with Image.open(io.BytesIO(content), formats=IMAGES) as image:
            # Where Pillow would only warn.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            # Of which Pillow would drop the lower half.
            if any(";16B" in str(tile) for tile in image.tile):
                raise UserError(f"{name} has 16 bits a channel; save it as 8-bit RGB.")
            form = str(image.format)
            image.load()
            grey = image.mode in ("L", "LA", "1")
            if image.mode in ("P", "PA") and ("transparency" in image.info or image.mode == "PA"):
                image = image.convert("RGBA")
            if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] < 255:
                raise UserError(f"{name} has transparent pixels; put it on a background and save it as RGB.")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                raise UserError(f"{name} has the pixel format {image.mode}; save it as 8-bit RGB.")
            return image.convert("RGB"), form, grey
    except Image.DecompressionBombError:
        reason = f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, as a decompression bomb has"
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(IMAGES)}"
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{name} cannot be read as an image ({reason}); remove it or copy it again.")


def ahead(
    items: Iterable[Any], work: Callable[[list[Any]], Any], size: int, workers: int | None = None
) -> Iterator[Any]:
    """work(items in groups of `size`), in order, some groups ahead in threads. Pillow decodes without the
    interpreter's lock, so they run beside the caller's networks.
    """
    items = iter(items)
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        try:
            while True:
                while len(waiting) < JOBS and (group := list(islice(items, size))):
                    waiting.append(pool.submit(work, group))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()


def pixel_hash(pixels: np.ndarray) -> int:
    """64 bits of the pixels."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest(), "little")
