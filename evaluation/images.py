"""Sets of images, always as uint8 (N, 3, H, W) batches: in memory, in a folder, or in Parquet files.

A set has one size of image, its own or that of a `Resize`. Files are taken in the order of their names.
What `evaluation.decoding` cannot turn into RGB without loss is refused by name.

Files are decoded ahead in threads while the caller works on earlier ones, a bounded number of batches at a
time, so memory does not grow with the set.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.decoding import AS_STORED, Decoded, Resize, ahead, decode, pixel_hash
from evaluation.stats import refuse_pickle
from stepdistill.errors import UserError
from stepdistill.provenance import sha256_of_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Images decoded by one job; nothing depends on it.
IO_BATCH = 16


@dataclass
class Facts:
    """What a pass over a set found out: for warnings beside a number.

    size: (width, height) after a Resize. lossy: JPEG files. grey: images stored without colour. hashes: 64 bits of
    every image's pixels.
    """

    n: int = 0
    size: tuple[int, int] | None = None
    lossy: int = 0
    grey: int = 0
    hashes: array = field(default_factory=lambda: array("Q"))

    @property
    def duplicates(self) -> int:
        """Images whose pixels another one before them has."""
        return len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, dtype=np.uint64))) if self.n else 0

    def shared_with(self, other: Facts) -> int:
        """Different images that both sets have."""
        both = [np.unique(np.frombuffer(one.hashes, dtype=np.uint64)) for one in (self, other) if one.n]
        return len(np.intersect1d(*both)) if len(both) == 2 else 0


class Images:
    """A set of images that can be gone through any number of times.

    Iterating gives uint8 batches (n, 3, H, W) in order of index; their sizes mean nothing. `facts` is what the
    last whole pass found, None before and where nothing is looked for.
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
        """This set, of which every whole pass finds out `facts`."""
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
            yield _to_tensor([np.asarray(self.resize(image)) for image in shown])


class Watched(Images):
    """Another set, of which every whole pass finds out `facts`."""

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


class _Files(Images):
    """Encoded images, decoded ahead. A subclass says where their bytes are: `_encoded`."""

    path: Path
    resize: Resize
    io_batch: int

    def __iter__(self) -> Iterator[Tensor]:
        facts, first = Facts(), None
        for job in ahead(self._encoded(), self._decoded, self.io_batch):
            for found in job:
                first = first or found
                if found.pixels.shape != first.pixels.shape:
                    (height, width, _), (first_height, first_width, _) = (
                        found.pixels.shape,
                        first.pixels.shape,
                    )
                    raise UserError(
                        f"{found.name} is {width}x{height} but {first.name} is {first_width}x{first_height}; "
                        "bring all images to one size first."
                    )
                facts.hashes.append(found.hash)
                facts.lossy += found.lossy
                facts.grey += found.grey
            facts.n += len(job)
            yield _to_tensor([found.pixels for found in job])
        height, width, _ = first.pixels.shape
        facts.size = (width, height)
        self.facts = facts

    def resized(self, resize: Resize) -> Images:
        return self if resize == self.resize else type(self)(self.path, resize, self.io_batch)

    def watched(self) -> Images:
        return self

    def peek(self) -> Facts:
        """Facts of the first image alone."""
        (found,) = self._decoded(list(islice(self._encoded(), 1)))
        height, width, _ = found.pixels.shape
        return Facts(1, (width, height), int(found.lossy), int(found.grey), array("Q", [found.hash]))

    def _encoded(self) -> Iterator[tuple[Callable[[], bytes], str]]:
        """For every image, what reads its bytes, and its name."""
        raise NotImplementedError

    def _decoded(self, job: list[tuple[Callable[[], bytes], str]]) -> list[Decoded]:
        return [decode(read(), name, self.resize) for read, name in job]


class FolderImages(_Files):
    """All PNG, JPEG, WebP and BMP files under a folder, ordered by name.

    Raises:
        UserError: the folder holds none (on creation); a file is damaged, has another size than the first or
            cannot be turned into RGB without loss (on iteration).
    """

    def __init__(
        self, path: str | os.PathLike[str], resize: Resize = AS_STORED, io_batch: int = IO_BATCH
    ) -> None:
        self.path, self.resize, self.io_batch = Path(path), resize, io_batch
        self.files = sorted(f for f in self.path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not self.files:
            raise UserError(
                f"there is no image ({', '.join(SUFFIXES)}) in {self.path}; give a folder of images."
            )

    def __len__(self) -> int:
        return len(self.files)

    def sha256(self) -> str:
        """Of names and contents."""
        return sha256_of_files(self.files, self.path)

    def _encoded(self) -> Iterator[tuple[Callable[[], bytes], str]]:
        return ((functools.partial(_bytes, file), str(file)) for file in self.files)


class ParquetImages(_Files):
    """The column `image` of a Parquet file or of all Parquet files in a folder, in the Hugging Face layout.

    Raises:
        UserError: a file cannot be read, has no such column (on creation) or holds what is no image (on
            iteration).
    """

    def __init__(
        self, path: str | os.PathLike[str], resize: Resize = AS_STORED, io_batch: int = IO_BATCH
    ) -> None:
        import pyarrow.parquet as pq

        self.path, self.resize, self.io_batch = Path(path), resize, io_batch
        self.files = sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]
        self._len = 0
        for file in self.files:
            try:
                with pq.ParquetFile(file) as opened:
                    names = opened.schema_arrow.names
                    self._len += opened.metadata.num_rows
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read as Parquet ({error}); copy it again.") from None
            if "image" not in names:
                raise UserError(f"{file} has the columns {', '.join(names)}; one named `image` is needed.")
        if not self._len:
            raise UserError(f"there is no image in {self.path}; the Parquet file has no rows.")

    def __len__(self) -> int:
        return self._len

    def sha256(self) -> str:
        """Of names and contents."""
        return sha256_of_files(self.files, self.path if self.path.is_dir() else self.path.parent)

    def _encoded(self) -> Iterator[tuple[Callable[[], bytes], str]]:
        import pyarrow.parquet as pq

        for file in self.files:
            row = 0
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(IO_BATCH, columns=["image"]):
                    for cell in batch.column(0).to_pylist():
                        name = f"row {row} of {file}"
                        content = cell.get("bytes") if isinstance(cell, dict) else cell
                        if not isinstance(content, bytes):
                            raise UserError(f"{name} holds no image bytes; the column must embed the images.")
                        yield functools.partial(bytes, content), name
                        row += 1


def open_images(
    path: str | os.PathLike[str], resize: Resize = AS_STORED, io_batch: int = IO_BATCH
) -> FolderImages | ParquetImages:
    """The set at `path`: a folder of images, a folder of Parquet files, or one Parquet file.

    `resize` is applied to every image as it is decoded; `io_batch` are decoded by one job, which changes
    nothing but memory.

    Raises:
        UserError: there is nothing at `path`, or nothing of the kind.
    """
    path = Path(path)
    if path.is_dir():
        kind = ParquetImages if any(path.rglob("*.parquet")) else FolderImages
        return kind(path, resize, io_batch)
    if path.suffix == ".parquet" and path.is_file():
        return ParquetImages(path, resize, io_batch)
    if path.exists():
        refuse_pickle(path)
        raise UserError(f"{path} is neither a folder of images nor a .parquet file.")
    raise UserError(f"there is nothing at {path}; give a folder of images or a .parquet file.")


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from None


def as_images(images: Tensor) -> Tensor:
    """`images` itself if it is a batch uint8 (N, 3, H, W).

    Raises:
        UserError: it is anything else.
    """
    if (
        not isinstance(images, Tensor)
        or images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 3
    ):
        found = (
            f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        )
        raise UserError(f"images must be a uint8 tensor (N, 3, H, W), got {found}.")
    return images


def rechunked(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in batches of exactly `size` (the last may be shorter), formed by index."""
    waiting: list[Tensor] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= size:
            rows = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            whole = count - count % size
            yield from rows[:whole].split(size)
            waiting, count = ([rows[whole:]], count - whole) if count > whole else ([], 0)
    if count:
        yield torch.cat(waiting)


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


def _to_tensor(batch: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
