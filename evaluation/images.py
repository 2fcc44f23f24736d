"""Sets of images, always as uint8 (N, 3, H, W) batches: in memory, in a folder, or in Parquet files.

A set has one size of image, its own or that of a `Resize`. Files are taken in the order of their names. What
is lossless to turn into RGB is turned (greyscale, palette, an opaque alpha channel); everything else is refused
by name, because a silent repair would change the number that is measured.

Files are decoded ahead in threads while the caller works on earlier ones, a bounded number of batches at a
time, so memory does not grow with the set.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from evaluation.stats import refuse_pickle
from stepdistill.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's names, antialiased
IO_BATCH = 16  # images decoded by one job; nothing depends on it
_JOBS = 4  # under way or waiting to be taken, at most


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


def patch_window(side: int) -> Resize:
    """What brings images of any sizes to one around a centre patch of this side, which stays the centre."""
    return Resize("window", side + 2)


@dataclass
class Facts:
    """What a pass over a set found out: for warnings beside a number."""

    n: int = 0
    size: tuple[int, int] | None = None  # width, height, after a Resize
    lossy: int = 0  # JPEG files
    grey: int = 0  # images stored without colour
    hashes: array = field(default_factory=lambda: array("Q"))  # 64 bits of every image's pixels

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
            facts.hashes.extend(_hash(image.contiguous().numpy()) for image in batch)
            yield batch
        self.facts = facts


class _Files(Images):
    """Encoded images, decoded ahead. A subclass says where their bytes are: `_encoded`."""

    path: Path
    resize: Resize
    io_batch: int

    def __iter__(self) -> Iterator[Tensor]:
        facts, first = Facts(), None
        for job in _ahead(self._encoded(), self._decoded, self.io_batch):
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

    def peek(self) -> Facts:
        """Facts of the first image alone."""
        (found,) = self._decoded(list(islice(self._encoded(), 1)))
        height, width, _ = found.pixels.shape
        return Facts(1, (width, height), int(found.lossy), int(found.grey), array("Q", [found.hash]))

    def _encoded(self) -> Iterator[tuple[Callable[[], bytes], str]]:
        """For every image, what reads its bytes, and its name."""
        raise NotImplementedError

    def _decoded(self, job: list[tuple[Callable[[], bytes], str]]) -> list[_Decoded]:
        found = []
        for read, name in job:
            image, form, grey = _opened(read(), name)
            pixels = np.asarray(self.resize(image))
            found.append(_Decoded(name, pixels, form == "JPEG", grey, _hash(pixels)))
        return found


@dataclass(frozen=True)
class _Decoded:
    name: str
    pixels: np.ndarray  # uint8 (H, W, 3)
    lossy: bool
    grey: bool
    hash: int


class FolderImages(_Files):
    """All PNG, JPEG, WebP and BMP files under a folder, ordered by name.

    Raises:
        UserError: the folder holds none (on creation); a file is damaged, has another size than the first or
            cannot be turned into RGB without loss (on iteration).
    """

    def __init__(
        self, path: str | os.PathLike[str], resize: Resize = Resize(), io_batch: int = IO_BATCH
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
        self, path: str | os.PathLike[str], resize: Resize = Resize(), io_batch: int = IO_BATCH
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
    path: str | os.PathLike[str], resize: Resize = Resize(), io_batch: int = IO_BATCH
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


def decode(content: bytes, name: str) -> np.ndarray:
    """One encoded image as uint8 (H, W, 3); `name` is what messages call it.

    Raises:
        UserError: it is damaged, far too large, or not 8-bit greyscale, palette, RGB or opaque RGBA.
    """
    return np.asarray(_opened(content, name)[0])


def _opened(content: bytes, name: str) -> tuple[Image.Image, str, bool]:
    """The image as RGB, the format it was stored in, and whether that was without colour."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # where Pillow would only warn
                raise Image.DecompressionBombError
            if any(";16B" in str(tile) for tile in image.tile):  # of which Pillow would drop the lower half
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
        reason = "its format is none that is known"
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{name} cannot be read as an image ({reason}); remove it or copy it again.")


def _ahead(
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
                while len(waiting) < _JOBS and (group := list(islice(items, size))):
                    waiting.append(pool.submit(work, group))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()


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


def _hash(pixels: np.ndarray) -> int:
    """64 bits of the pixels."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest(), "little")


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
