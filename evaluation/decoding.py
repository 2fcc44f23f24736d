"""One encoded image to pixels: what is taken, what is refused, how it is cropped and resized, and in which threads.

What is lossless to turn into RGB is turned (greyscale, palette, an opaque alpha channel). CMYK, an EXIF
orientation and animated files are read as the tools of the public references read them, and counted. Everything
else is refused by name, because a silent repair would change the number that is measured.
"""

from __future__ import annotations

import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from evaluation.facts import pixel_hash
from stepdistill.errors import UserError
from stepdistill.untrusted import IMAGES

# More decoders of pixels alone, for sets that a person measures; a camera's MPO is a JPEG to begin with.
FORMATS = (*IMAGES, "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
# Pillow's names; all of them antialias.
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CROPS = ("none", "centre", "torchvision", "short-side", "adm", "window")
# Groups of images under way or waiting to be taken, at most.
JOBS = 4


@dataclass(frozen=True)
class Resize:
    """What is done to every image of a set before anything is measured, in uint8 throughout.

    crop:
        "none"; "centre": the largest square in the middle, an odd margin's smaller half before it (EDM's
        dataset_tool); "torchvision": the same with the margin rounded, half to even (GigaGAN, DMD2); "short-side":
        resized by its short side, then that crop (torchvision's Resize and CenterCrop); "adm": halved by box while
        twice too large, brought to `size` by bicubic, then cropped (ADM's center_crop_arr, EDM2's
        center-crop-dhariwal); "window": `size` pixels in the middle, rounded, of images that have so many.
    size: side of the square result; 0 leaves images as they are. filter: one of Pillow's, which all antialias.
    """

    crop: str = "none"
    size: int = 0
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        needs_size = self.crop in CROPS[3:] and not self.size
        if self.crop not in CROPS or self.filter not in FILTERS or self.size < 0 or needs_size:
            raise UserError(
                f"resize needs a crop among {', '.join(CROPS)}, a size of 0 or more (of 1 or more for the last three) "
                f"and a filter among {', '.join(FILTERS)}; got {self.crop!r}, {self.size} and {self.filter!r}."
            )

    def __bool__(self) -> bool:
        return self.crop != "none" or self.size > 0

    def __str__(self) -> str:
        size = f"{self.size}x{self.size}" if self.size else ""
        how = {"none": "", "adm": "box, bicubic", "window": ""}.get(self.crop, self.filter if size else "")
        return (
            ", ".join(part for part in (self.crop if self.crop != "none" else "", how, size) if part)
            or "as stored"
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crop and resize."""
        size = self.size
        if self.crop == "window":
            # The source leaves these as they are, and its network's own resize brings them to this size.
            small = min(image.size) < size
            return _resized(image, (size, size), "bicubic") if small else _square(image, size, True)
        if self.crop == "adm":
            while min(image.size) >= 2 * size:
                image = _resized(image, (image.width // 2, image.height // 2), "box")
            scale = size / min(image.size)
            return _square(
                _resized(image, tuple(round(x * scale) for x in image.size), "bicubic"), size, False
            )
        if self.crop == "short-side":
            short = min(image.size)
            image = _resized(
                image, tuple(size if x == short else int(size * x / short) for x in image.size), self.filter
            )
            return _square(image, size, True)
        if self.crop != "none":
            image = _square(image, min(image.size), self.crop == "torchvision")
        return _resized(image, (size, size), self.filter) if size else image


def _square(image: Image.Image, side: int, rounded: bool) -> Image.Image:
    """The middle; a margin that is odd is rounded, half to even, or its smaller half is before it."""
    left, top = (round((x - side) / 2) if rounded else (x - side) // 2 for x in image.size)
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, size: tuple[int, ...], how: str) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling[how.upper()])


AS_STORED = Resize()


@dataclass(frozen=True)
class Decoded:
    """pixels: uint8 (H, W, 3). traits: as in `Facts`. hash: of the pixels."""

    name: str
    pixels: np.ndarray
    traits: frozenset[str]
    hash: int


def decode(content: bytes, name: str, resize: Resize = AS_STORED) -> Decoded:
    """One encoded image; `name` is what messages call it. Raises UserError if it is damaged, far too large, has
    transparent pixels, or more than 8 bits a channel.
    """
    image, traits = _opened(content, name)
    if resize.crop == "window" and min(image.size) < resize.size:
        traits = traits | {"small"}
    pixels = np.asarray(resize(image))
    return Decoded(name, pixels, traits, pixel_hash(pixels))


def header(content: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an encoded image, of which nothing but the header is read. Raises UserError."""
    return _opened(content, name, load=False)[0].size


def _opened(content: bytes, name: str, load: bool = True) -> tuple[Image.Image, frozenset[str]]:
    """The image as RGB, and its traits; without `load` as Pillow opens it, and none."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # Where Pillow would only warn.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            # Of which Pillow would drop the lower half.
            if any(";16B" in str(tile) for tile in image.tile):
                raise UserError(f"{name} has 16 bits a channel; save it as 8-bit RGB.")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK"):
                raise UserError(f"{name} has the pixel format {image.mode}; save it as 8-bit RGB.")
            if not load:
                return image, frozenset()
            image.load()
            traits = _traits(image, content)
            if "transparency" in image.info or image.mode == "PA":
                image = image.convert("RGBA")
            if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] < 255:
                raise UserError(f"{name} has transparent pixels; put it on a background and save it as RGB.")
            return image.convert("RGB"), traits
    except Image.DecompressionBombError:
        reason = f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, as a decompression bomb has"
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}"
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{name} cannot be read as an image ({reason}); remove it or copy it again.")


def _traits(image: Image.Image, content: bytes) -> frozenset[str]:
    form = str(image.format)
    lossy = form in ("JPEG", "MPO", "AVIF", "JPEG2000") or (form == "WEBP" and b"VP8L" not in content[:4096])
    has = {
        "lossy": lossy,
        "grey": image.mode in ("L", "LA", "1"),
        "CMYK": image.mode == "CMYK",
        "orientation": form in ("JPEG", "MPO", "TIFF", "WEBP", "PNG")
        and image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
        "animated": form != "MPO" and getattr(image, "is_animated", False),
    }
    return frozenset(trait for trait, there in has.items() if there)


@functools.cache
def suffixes() -> frozenset[str]:
    """Of files that are images by their names, in lower case."""
    return frozenset(ext for ext, form in Image.registered_extensions().items() if form in (*FORMATS, "MPO"))


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
