"""Images that lie encoded somewhere: what can be used of them, decoded to one size."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from stepdistill.errors import UserError
from stepdistill.untrusted import IMAGES
from training.data.base import Partition, Source, at_least, because, counts, digest, facts, image_size

if TYPE_CHECKING:
    from PIL import Image

# Pillow's own limit (a quarter GiB of RGB): beyond it, it takes a file for a bomb.
MAX_PIXELS = 89_478_485
# Images decoded, encoded bytes held, at a time.
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Files(Partition):
    """What the sources of stored images have in common.

    Attributes:
        path: where they lie.
        resolution: [height, width] in pixels that images are resized to, at least 8, once they are cut to that shape
            about their centre; or the side of a square.
        min_size: images whose shorter side is below this are dropped; 0 = keep and enlarge.
        memory_gb: up to this (GiB), decoded images stay in memory. Beyond it a batch is read and decoded when it is
            asked for; a shuffled batch of a Parquet file then reads whole row groups, so encode such data to
            latents first.
    """

    path: Path
    resolution: int | tuple[int, int] = 64
    min_size: int = 0
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(8, resolution=min(image_size(self.resolution)))
        at_least(0, min_size=self.min_size, memory_gb=self.memory_gb)


class Stored(Source):
    """Encoded images with captions or labels; subclasses list them and read their bytes.

    Every image is decoded once at opening, so a broken file is counted now and ends no run at hour ten.
    """

    def _open(
        self,
        captions: list[str | None] | None,
        labels: list[int | None] | None,
        class_names: tuple[str, ...] | None,
        total: int,
        dropped: collections.Counter[str],
    ) -> None:
        """Drop what cannot be used of `total` listed examples and take stock of the rest."""
        candidates = []
        for i in self._ours(captions, labels, class_names, total, dropped):
            missing = "no caption" if captions is not None and not captions[i] else ""
            missing = "no label" if labels is not None and labels[i] is None else missing
            if missing:
                dropped[missing] += 1
            else:
                candidates.append(i)
        kept = self._kept = self._decode(candidates, dropped)
        self.size = len(kept)
        self.captions = [captions[i] for i in kept] if captions is not None else None
        self.labels = [labels[i] for i in kept] if labels is not None else None
        self.class_names = class_names if labels is not None else None
        self.counts = counts(self.size, dropped)

    def _ours(
        self,
        captions: list[str | None] | None,
        labels: list[int | None] | None,
        class_names: tuple[str, ...] | None,
        total: int,
        dropped: collections.Counter[str],
    ) -> list[int]:
        """The listed examples of our part of the partition."""
        config = self.config
        if labels is not None:
            block, self.routing = config.of_classes(len(class_names or ()))
            classes = set(block)
            ours = [i for i in range(total) if labels[i] is None or labels[i] in classes]
        elif captions is not None:
            ours, self.routing = config.of_captions([caption or "" for caption in captions])
        else:
            ours = list(config.block(total))
        dropped["in other partitions"] += total - len(ours)
        return ours

    def _decode(self, candidates: list[int], dropped: collections.Counter[str]) -> list[int]:
        """The candidates that decode; their pixels stay in memory where they fit, and their bytes are hashed."""
        config, size = self.config, self.image_size
        fits = len(candidates) * math.prod(size) * 3 <= config.memory_gb * 2**30
        pixels = np.empty((len(candidates), *size, 3), np.uint8) if fits else None
        kept, hashed = [], hashlib.sha256()
        decode = functools.partial(decoded, resolution=size, min_size=config.min_size)
        main = os.environ.get("LOCAL_RANK", "0") == "0"
        shown = {"desc": "reading images", "unit": "image", "disable": None if main else True, "delay": 1}
        with (
            warnings.catch_warnings(),
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            tqdm(total=len(candidates), **shown) as bar,
        ):
            # Pillow warns of what is counted here.
            warnings.simplefilter("ignore")
            raws = self._raw(candidates)
            for first in range(0, len(candidates), CHUNK):
                chunk = candidates[first : first + CHUNK]
                encoded = [next(raws) for _ in chunk]
                for i, raw, result in zip(chunk, encoded, pool.map(decode, encoded), strict=True):
                    if isinstance(result, str):
                        dropped[result] += 1
                        continue
                    if pixels is not None:
                        pixels[len(kept)] = result
                    kept.append(i)
                    hashed.update(hashlib.sha256(raw).digest())
                bar.update(len(chunk))
        if not kept:
            raise UserError(f"data.path={config.path} holds no usable image{because(dropped)}.")
        self._digest = hashed.hexdigest()
        self._pixels = pixels[: len(kept)] if pixels is not None else None
        return kept

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | None]:
        """Encoded bytes of the listed examples (numbers before dropping), in order; None where missing."""
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> np.ndarray:
        if self._pixels is not None:
            return self._pixels[np.asarray(indices, dtype=np.int64)]
        out = np.empty((len(indices), *self.image_size, 3), np.uint8)
        listed = np.array([self._kept[index] for index in indices], np.int64)
        # In the order of the files, so that each is read once.
        rows = np.argsort(listed, kind="stable")
        for row, raw in zip(rows, self._raw(listed[rows].tolist()), strict=True):
            result = decoded(raw, self.image_size, self.config.min_size)
            if isinstance(result, str):
                raise UserError(
                    f"data.path={self.config.path} changed while it was in use ({result}); start again."
                )
            out[row] = result
        return out

    def fingerprint(self) -> str:
        texts = "\n".join(self.captions) if self.captions is not None else ""
        labels = np.asarray(self.labels, np.int64).tobytes() if self.labels is not None else b""
        return digest([facts(self.config), self._digest, texts, labels])


def decoded(raw: bytes | None, resolution: int | tuple[int, int], min_size: int = 0) -> np.ndarray | str:
    """The middle of an encoded image as uint8 (height, width, 3), as much of it as has that shape, or why it cannot
    be used. resolution: (height, width) in pixels, or the side of a square.

    RGB, turned upright by its EXIF tag, transparency laid on white, resized with a Lanczos filter. Pillow's, as the
    evaluation's protocols are: torchvision has no Lanczos filter for tensors and no 16-bit grey.
    """
    from PIL import Image, ImageOps

    if not isinstance(raw, bytes) or not raw:
        return "no image bytes"
    try:
        image = Image.open(io.BytesIO(raw), formats=IMAGES)
        width, height = image.size
        if width * height > MAX_PIXELS:
            return "too large"
        if min(width, height) < min_size:
            return "too small"
        image = _rgb(ImageOps.exif_transpose(image))
        height, width = image_size(resolution)
        # The largest box of the wanted shape; whole numbers where it is a square.
        scale = min(image.height / height, image.width / width)
        tall, wide = min(image.height, round(scale * height)), min(image.width, round(scale * width))
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        if image.size != (width, height):
            box = (left, top, left + wide, top + tall)
            image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
        return np.asarray(image)
    except Image.DecompressionBombError:
        return "too large"
    except MemoryError:
        raise
    except Exception:
        # A damaged file makes the decoders raise nearly anything.
        return "unreadable image"


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16-bit grey, which convert() would clip to white.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
