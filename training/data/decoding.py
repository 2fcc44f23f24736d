"""An encoded image as pixels of one of the sizes a source has, and what was cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stepdistill.untrusted import IMAGE_BYTES, opened_image
from training.data.buckets import Size, nearest_size

if TYPE_CHECKING:
    from PIL import Image

# Rows that become RGB at a time, where an image has another mode.
STRIP = 256


@dataclass(frozen=True)
class Cut:
    """The middle of an image, as much of it as has the shape that is wanted.

    Attributes:
        pixels: uint8 (height, width, 3), RGB.
        original: (height, width) of the whole image, upright.
        corner: how many pixels of it are left out at its top and at its left, once it has the scale of `pixels`.
    """

    pixels: np.ndarray
    original: Size
    corner: Size


def decoded(raw: bytes | str, sizes: Sequence[Size], min_size: int = 0) -> Cut | str:
    """An encoded image at the one of `sizes`, (height, width), whose aspect ratio is nearest, or why it cannot be used;
    a reason given in place of the bytes is given back.

    Turned upright by its EXIF tag, transparency laid on white, resized with a Lanczos filter. Pillow's, as the
    evaluation's protocols are: torchvision has no Lanczos filter for tensors and no 16-bit grey.
    """
    from PIL import Image, ImageOps

    if isinstance(raw, str) or not raw:
        return raw or "no image bytes"
    if len(raw) > IMAGE_BYTES:
        return "too large"
    try:
        with opened_image(raw) as image:
            if min(image.size) < min_size:
                return "too small"
            ImageOps.exif_transpose(image, in_place=True)
            return _cut(_rgb(image), sizes)
    except Image.DecompressionBombError:
        return "too large"
    except MemoryError:
        raise
    except Exception:
        # A damaged file makes the decoders raise nearly anything.
        return "unreadable image"


def _cut(image: Image.Image, sizes: Sequence[Size]) -> Cut:
    from PIL import Image

    height, width = nearest_size(image.height, image.width, sizes)
    # The largest box of the wanted shape; whole numbers where it is a square.
    scale = min(image.height / height, image.width / width)
    tall, wide = min(image.height, round(scale * height)), min(image.width, round(scale * width))
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    original, corner = (image.height, image.width), (round(top / scale), round(left / scale))
    if image.size != (width, height):
        box = (left, top, left + wide, top + tall)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return Cut(np.asarray(image), original, corner)


def _rgb(image: Image.Image) -> Image.Image:
    """As RGB, a strip at a time: a large image of another mode is never held more than twice."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        whole.paste(_strip_rgb(strip), (0, top))
    return whole


def _strip_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16-bit grey, which convert() would clip to white.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
