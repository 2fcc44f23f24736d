"""Sets of images, always as uint8 (N, 3, H, W) batches: in memory, in a folder, or in Parquet files.

A set has one size of image. Files are taken in the order of their names. What is lossless to turn into RGB is
turned (greyscale, palette, an opaque alpha channel); everything else is refused by name, because a silent
repair would change the number that is measured.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IO_BATCH = 64


class Images:
    """A set of images that can be gone through any number of times.

    Iterating gives uint8 batches (n, 3, H, W) in order of index; their sizes mean nothing.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Tensor]:
        raise NotImplementedError

    def first(self, count: int) -> Images:
        """The first `count` images of this set."""
        return self if count >= len(self) else _First(self, count)


class MemoryImages(Images):
    """A set held in memory, from batches uint8 (n, 3, H, W)."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = [as_images(batch) for batch in batches]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class FolderImages(Images):
    """All PNG, JPEG, WebP and BMP files under a folder, ordered by name.

    Raises:
        UserError: the folder holds none (on creation); a file is damaged, has another size than the first or
            cannot be turned into RGB without loss (on iteration).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = sorted(f for f in self.path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not self.files:
            raise UserError(
                f"there is no image ({', '.join(SUFFIXES)}) in {self.path}; give a folder of images."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Tensor]:
        return _stacked((decode(file.read_bytes(), str(file)), str(file)) for file in self.files)

    def sha256(self) -> str:
        """Of names and contents, so that a changed pixel is a different set."""
        return sha256_of_files(self.files, self.path)


class ParquetImages(Images):
    """The column `image` (a struct with `bytes`, or bytes) of a Parquet file or of all in a folder.

    Raises:
        UserError: no such column, or as for `FolderImages`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import pyarrow.parquet as pq

        self.path = Path(path)
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

    def __iter__(self) -> Iterator[Tensor]:
        return _stacked(self._decoded())

    def sha256(self) -> str:
        """Of names and contents."""
        return sha256_of_files(self.files, self.path if self.path.is_dir() else self.path.parent)

    def _decoded(self) -> Iterator[tuple[np.ndarray, str]]:
        import pyarrow.parquet as pq

        for file in self.files:
            row = 0
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(_IO_BATCH, columns=["image"]):
                    for cell in batch.column(0).to_pylist():
                        name = f"row {row} of {file}"
                        content = cell.get("bytes") if isinstance(cell, dict) else cell
                        if not isinstance(content, bytes):
                            raise UserError(f"{name} holds no image bytes; the column must embed the images.")
                        yield decode(content, name), name
                        row += 1


def open_images(path: str | os.PathLike[str]) -> FolderImages | ParquetImages:
    """The set at `path`: a folder of images, a folder of Parquet files, or one Parquet file.

    Raises:
        UserError: there is nothing at `path`, or nothing of the kind.
    """
    path = Path(path)
    if path.is_dir():
        return ParquetImages(path) if any(path.rglob("*.parquet")) else FolderImages(path)
    if path.suffix == ".parquet" and path.is_file():
        return ParquetImages(path)
    if path.exists():
        raise UserError(f"{path} is neither a folder of images nor a .parquet file.")
    raise UserError(f"there is nothing at {path}; give a folder of images or a .parquet file.")


def decode(content: bytes, name: str) -> np.ndarray:
    """One encoded image as uint8 (H, W, 3); `name` is what messages call it.

    Raises:
        UserError: it is damaged, or not 8-bit greyscale, palette, RGB or opaque RGBA.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode in ("P", "PA") and ("transparency" in image.info or image.mode == "PA"):
                image = image.convert("RGBA")
            if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] < 255:
                raise UserError(f"{name} has transparent pixels; put it on a background and save it as RGB.")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                raise UserError(f"{name} has the pixel format {image.mode}; save it as 8-bit RGB.")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as an image ({error}); remove it or copy it again.") from None


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


def _stacked(decoded: Iterator[tuple[np.ndarray, str]]) -> Iterator[Tensor]:
    """Decoded images (H, W, 3) with their names as batches (n, 3, H, W), all of the first one's size."""
    batch: list[np.ndarray] = []
    first: tuple[tuple[int, ...], str] | None = None
    for image, name in decoded:
        first = first or (image.shape, name)
        if image.shape != first[0]:
            (height, width, _), (first_height, first_width, _) = image.shape, first[0]
            raise UserError(
                f"{name} is {width}x{height} but {first[1]} is {first_width}x{first_height}; "
                "bring all images to one size first."
            )
        batch.append(image)
        if len(batch) == _IO_BATCH:
            yield _to_tensor(batch)
            batch = []
    if batch:
        yield _to_tensor(batch)


def _to_tensor(batch: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


def sha256_of_files(files: Iterable[Path], root: Path) -> str:
    """Of the names relative to `root` and the contents, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        digest.update(file.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()
