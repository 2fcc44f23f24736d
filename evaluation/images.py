"""Sets of images, always as uint8 (N, 3, H, W) batches; those in files are in `evaluation.files`.

A set has one size of image, its own or that of a `Resize`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.decoding import Resize
from evaluation.facts import Facts, pixel_hash
from stepdistill.errors import UserError


class Images:
    """A set of images that can be gone through any number of times.

    Iterating gives uint8 batches (n, 3, H, W) in order of index; their sizes mean nothing. `facts` is what the
    last whole pass noticed, None before and where nothing is looked for.
    """

    facts: Facts | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Tensor]:
        raise NotImplementedError

    def first(self, count: int) -> Images:
        """The first `count` images of this set."""
        return self if count >= len(self) else _First(self, count)

    def resized(self, resize: Resize) -> Images:
        """This set with every image cropped and resized from how it is stored."""
        return ResizedImages(self, resize) if resize else self

    def watched(self) -> Images:
        """This set, of which every whole pass notices `facts`."""
        return Watched(self)


class MemoryImages(Images):
    """A set held in memory, from batches uint8 (n, 3, H, W)."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = [as_images(batch) for batch in batches]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class ResizedImages(Images):
    """Another set, with every image cropped and resized."""

    def __init__(self, images: Images, resize: Resize) -> None:
        self.images, self.resize = images, resize

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.images:
            shown = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch)
            yield to_tensor([np.asarray(self.resize(image)) for image in shown])

    def resized(self, resize: Resize) -> Images:
        return self.images.resized(resize)

    @property
    def names(self) -> list[str]:
        """Of the set behind it."""
        return self.images.names

    @property
    def path(self) -> Path:
        """Of the set behind it."""
        return self.images.path

    def sha256(self) -> str:
        """Of the set behind it."""
        return self.images.sha256()


class Watched(Images):
    """Another set, of which every whole pass notices `facts`."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        facts = Facts()
        for batch in self.images:
            facts.n += len(batch)
            facts.size = (batch.shape[-1], batch.shape[-2])
            facts.hashes.extend(pixel_hash(image.contiguous().numpy()) for image in batch)
            yield batch
        self.facts = facts


class _First(Images):
    def __init__(self, images: Images, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        left = self.count
        for batch in self.images:
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return


def as_images(images: Tensor) -> Tensor:
    """`images` itself if it is a batch uint8 (N, 3, H, W). Raises UserError if it is anything else."""
    if (
        not isinstance(images, Tensor)
        or images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 3
    ):
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"images must be a uint8 tensor (N, 3, H, W), got {got}.")
    return images


def rechunked(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in batches of exactly `size` (the last may be shorter), formed by index. Raises as `joined`."""
    waiting: list[Tensor] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= size:
            rows = joined(waiting)
            whole = count - count % size
            yield from rows[:whole].split(size)
            waiting, count = ([rows[whole:]], count - whole) if count > whole else ([], 0)
    if count:
        yield joined(waiting)


def joined(batches: Sequence[Tensor]) -> Tensor:
    """All rows of the batches. Raises UserError for images of two sizes, which a sampler that varies its size returns."""
    first = batches[0]
    other = next((batch for batch in batches if batch.shape[1:] != first.shape[1:]), None)
    if other is not None:
        sizes = " and ".join(f"{one.shape[-1]}x{one.shape[-2]}" for one in (first, other))
        raise UserError(f"the images have two sizes, {sizes}; a set needs one size for all.")
    return torch.cat(tuple(batches)) if len(batches) > 1 else first


def to_tensor(batch: list[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) each to (N, 3, H, W)."""
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
