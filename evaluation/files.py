"""Sets of images in files: folders, zip and tar archives, Parquet files, NumPy arrays.

Files are taken in the natural order of their names, in which 9.png comes before 10.png; a set says what it left
out. They are decoded ahead in threads while the caller works on earlier ones, a bounded number of batches at a
time, so memory does not grow with the set.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor

from evaluation.arrays import ArrayImages
from evaluation.decoding import AS_STORED, Decoded, Resize, ahead, decode, header, suffixes
from evaluation.facts import Facts, counted
from evaluation.images import Images, to_tensor
from evaluation.names import left_out, natural
from evaluation.pickles import refuse_pickle
from evaluation.settings import Place
from stepdistill.errors import UserError
from stepdistill.provenance import sha256_of_files
from stepdistill.untrusted import IMAGE_BYTES, read_regular, readable

# Images decoded by one job; nothing depends on it.
IO_BATCH = 16
# Columns of Parquet files that hold images, the first that is there.
COLUMNS = ("image", "img")
_KINDS = "a folder of images, a .zip, .tar or .parquet file, or an .npy or .npz array"
# What reads an image's bytes, and its name.
Encoded = tuple[Callable[[], bytes], str]


class FileImages(Images):
    """Encoded images, decoded ahead. A subclass says where their bytes are: `_encoded`. Raises UserError if there is
    no image (on creation); one is damaged, has another size than the first or cannot be turned into RGB (on
    iteration).
    """

    # Files that were left out, by reason.
    skipped: Counter
    # Whether names tell the order, as in a folder; an archive that is read from end to end has one of its own.
    named = True

    def __init__(
        self, path: Path, files: list[Path], resize: Resize = AS_STORED, io_batch: int = IO_BATCH
    ) -> None:
        self.path, self.files, self.resize, self.io_batch = path, files, resize, io_batch
        self.skipped = Counter()
        self._names = self._listed()
        if not self._names:
            among = f" among {counted(self.skipped)}" if self.skipped else ""
            raise UserError(f"there is no image in {path}{among}; give {_KINDS}.")

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Tensor]:
        facts, first = Facts(skipped=self.skipped), None
        for job in ahead(self._encoded(), self._decoded, self.io_batch):
            for one in job:
                first = first or one
                _same_size((one.name, one.pixels.shape[1::-1]), (first.name, first.pixels.shape[1::-1]))
                facts.hashes.append(one.hash)
                facts.traits.update(one.traits)
            facts.n += len(job)
            yield to_tensor([one.pixels for one in job])
        facts.size = first.pixels.shape[1::-1]
        self.facts = facts

    @property
    def names(self) -> list[str]:
        """Of the images, relative to `path`, in order; [] where they have none but their order is known."""
        return self._names if self.named else []

    def sha256(self) -> str:
        """Of names and contents."""
        return sha256_of_files(sorted(self.files), self.path if self.path.is_dir() else self.path.parent)

    def resized(self, resize: Resize) -> Images:
        if resize == self.resize:
            return self
        other = type(self)(self.path, self.files, resize, self.io_batch)
        other.skipped = self.skipped
        return other

    def watched(self) -> Images:
        return self

    def peek(self) -> Facts:
        """Facts of the first image alone."""
        (one,) = self._decoded(list(islice(self._encoded(), 1)))
        return Facts(1, one.pixels.shape[1::-1], Counter(one.traits), array("Q", [one.hash]), self.skipped)

    def check_headers(self) -> None:
        """Open every image's header. Raises UserError for the first that is damaged, or of another size if that
        matters."""
        first = None
        for job in ahead(
            self._encoded(), lambda job: [(name, header(read(), name)) for read, name in job], self.io_batch
        ):
            for name, size in job:
                first = first or (name, size)
                if not self.resize:
                    _same_size((name, size), first)

    def _listed(self) -> list[str]:
        """Names of the images; fills `skipped`."""
        raise NotImplementedError

    def _encoded(self) -> Iterator[Encoded]:
        raise NotImplementedError

    def _decoded(self, job: list[Encoded]) -> list[Decoded]:
        return [decode(read(), name, self.resize) for read, name in job]

    def _chosen(self, names: Iterable[str]) -> list[str]:
        """Those that are images by their names; the others are skipped."""
        looked_at = [(name, left_out(name)) for name in names]
        self.skipped.update(reason for _, reason in looked_at if reason)
        return [name for name, reason in looked_at if not reason]


class FolderImages(FileImages):
    """Everything Pillow takes for an image of pixels under a folder, also behind links."""

    def _listed(self) -> list[str]:
        return [str(file.relative_to(self.path)) for file in self.files]

    def _encoded(self) -> Iterator[Encoded]:
        return ((functools.partial(_bytes, file), str(file)) for file in self.files)


class ZipImages(FileImages):
    """The images in a .zip file, as EDM's dataset_tool writes them."""

    def _listed(self) -> list[str]:
        with readable(self.path, "a zip file"), zipfile.ZipFile(self.path) as opened:
            chosen = self._chosen(name for name in opened.namelist() if not name.endswith("/"))
            return sorted(chosen, key=natural)

    def _encoded(self) -> Iterator[Encoded]:
        # Not closed here: threads read of it until the last image is decoded.
        opened = zipfile.ZipFile(self.path)
        whole = f"of {self.path}"
        return ((functools.partial(_of_zip, opened, name, whole), f"{name} {whole}") for name in self._names)


class TarImages(FileImages):
    """The images in .tar files, in the order they lie there, as WebDataset has them."""

    named = False

    def _listed(self) -> list[str]:
        return self._chosen(member for file in self.files for member, _ in _members(file))

    def _encoded(self) -> Iterator[Encoded]:
        for file in self.files:
            for name, read in _members(file):
                if not left_out(name):
                    yield functools.partial(bytes, read()), f"{name} of {file}"


class ParquetImages(FileImages):
    """The column `image` or `img` of Parquet files, in the Hugging Face layout."""

    named = False

    def _listed(self) -> list[str]:
        return [""] * sum(rows for _, rows in map(_parquet_column, self.files))

    def _encoded(self) -> Iterator[Encoded]:
        import pyarrow.parquet as pq

        for file in self.files:
            row, (column, _) = 0, _parquet_column(file)
            with readable(file, "Parquet"), pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(IO_BATCH, columns=[column]):
                    for cell in batch.column(0).to_pylist():
                        name = f"row {row} of {file}"
                        content = cell.get("bytes") if isinstance(cell, dict) else cell
                        if not isinstance(content, bytes):
                            raise UserError(f"{name} holds no image bytes; the column must embed the images.")
                        yield functools.partial(bytes, content), name
                        row += 1


def open_images(
    path: Place, resize: Resize = AS_STORED, io_batch: int = IO_BATCH
) -> FileImages | ArrayImages | Images:
    """The set at `path`: a folder of images, of Parquet or of tar files; one of these, a zip, or an array.

    A pattern, "data/train-*.parquet", names some files of a folder. `resize` is applied to every image as it is
    decoded; `io_batch` are decoded by one job, which changes nothing but memory. Raises UserError if there is nothing
    at `path`, or nothing of the kind.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, resize, io_batch)
    several = not path.exists() and "*" in path.name
    files = sorted(path.parent.glob(path.name), key=lambda file: natural(file.name)) if several else [path]
    place = path.parent if several else path
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"there is nothing at {path}; give {_KINDS}.")
    kind = {".parquet": ParquetImages, ".tar": TarImages, ".zip": ZipImages}.get(files[0].suffix.lower())
    if kind and (kind is not ZipImages or not several):
        return kind(place, files, resize, io_batch)
    if files[0].suffix.lower() in (".npy", ".npz") and not several:
        images = ArrayImages(path)
        return images.resized(resize)
    refuse_pickle(path)
    raise UserError(f"{path} is not {_KINDS}.")


def _open_folder(path: Path, resize: Resize, io_batch: int) -> FileImages:
    files, skipped = _walked(path)
    images = [file for file in files if file.suffix.lower() in suffixes()]
    kinds = ((FolderImages, images), *((kind, [f for f in files if f.suffix.lower() == suffix])
             for kind, suffix in ((ParquetImages, ".parquet"), (TarImages, ".tar"))))  # fmt: skip
    kind, chosen = next((pair for pair in kinds if pair[1]), kinds[0])
    chosen = sorted(chosen, key=lambda file: natural(str(file.relative_to(path))))
    rest = Counter(file.suffix.lower() or "without a suffix" for file in set(files) - set(chosen)) + skipped
    if kind is ParquetImages:
        _refuse_splits(path, chosen)
    try:
        found = kind(path, chosen, resize, io_batch)
    except UserError:
        if rest and not chosen:
            raise UserError(f"there is no image in {path} among {counted(rest)}; give {_KINDS}.") from None
        raise
    found.skipped += rest
    return found


def _walked(path: Path) -> tuple[list[Path], Counter]:
    """All files under a folder, also behind links to folders; and what was not gone into."""
    files, skipped, seen = [], Counter(), set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            skipped["linked twice"] += 1
            folders.clear()
            continue
        seen.add(real)
        skipped["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file()
        ]
    return files, +skipped


def _same_size(one: tuple[str, tuple[int, int]], first: tuple[str, tuple[int, int]]) -> None:
    (name, size), (other, usual) = one, first
    if size != usual:
        raise UserError(
            f"{name} is {size[0]}x{size[1]} but {other} is {usual[0]}x{usual[1]}; bring all images to one size first."
        )


def _refuse_splits(path: Path, files: list[Path]) -> None:
    """Parquet files of several splits in one folder, "train-00000-of-00002.parquet" and "test-...", are no one set."""
    splits = dict.fromkeys(
        re.split(r"-?\d", str(file.relative_to(path).with_suffix("")), maxsplit=1)[0] for file in files
    )
    if len(splits) > 1:
        raise UserError(
            f"{path} holds Parquet files of {len(splits)} sets, {', '.join(splits)}; name one, as "
            f"{path / next(iter(splits))}*.parquet."
        )


def _parquet_column(file: Path) -> tuple[str, int]:
    """The column that holds images, and the number of rows."""
    import pyarrow.parquet as pq

    with readable(file, "Parquet"), pq.ParquetFile(file) as opened:
        names, rows = opened.schema_arrow.names, opened.metadata.num_rows
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise UserError(
            f"{file} has the columns {', '.join(names)}; one named {' or '.join(COLUMNS)} is needed."
        )
    return column, rows


def _members(file: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with readable(file, "a tar file"), tarfile.open(file) as opened:
        for member in opened:
            if member.isfile():
                yield member.name, lambda member=member: opened.extractfile(member).read(IMAGE_BYTES)


def _of_zip(opened: zipfile.ZipFile, name: str, whole: str) -> bytes:
    """The first `IMAGE_BYTES` of a file in an archive: what is longer is no image, and may be zeros without end."""
    with readable(f"{name} {whole}", "a file in it"), opened.open(name) as file:
        return file.read(IMAGE_BYTES)


def _bytes(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from None
