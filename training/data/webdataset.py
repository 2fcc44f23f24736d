"""Images in tar files, as WebDataset lays them out: the files of a sample share their name up to its first dot."""

from __future__ import annotations

import collections
import contextlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from stepdistill.errors import UserError, first_line
from stepdistill.untrusted import IMAGE_BYTES, open_regular
from training.data.folder import IMAGE_SUFFIXES
from training.data.reading import TEXT_BYTES, captions_in, captions_of, files_of, json_object
from training.data.stored import Files, Listing, Stored, class_names

IMAGES = tuple(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))
TEXTS, CLASS = ("txt", "caption", "json"), "cls"
# Of a tar's blocks. It ends with two that are empty.
BLOCK = 512


@dataclass(frozen=True)
class Place:
    """Where the bytes of an image lie."""

    tar: Path
    start: int
    size: int


class WebDataset(Stored):
    """Tar files of images (.png, .jpg, .jpeg, .webp) with captions (.txt or .caption, one a line, or "text" in .json) or a
    class number (.cls). `path` is one file or a folder of them.

    Each is read through once, when it is opened; an image is then read where it lies, and nothing is unpacked. A link,
    a name that leads out of the tar and any other kind of file is counted and left out. Tars must not be compressed,
    which images are already.
    """

    @dataclass(frozen=True)
    class Config(Files):
        """class_names: of the class numbers; () = the numbers themselves."""

        class_names: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        dropped: collections.Counter[str] = collections.Counter()
        samples = [sample for tar in files_of(config.path, ".tar") for sample in _samples(tar, dropped)]
        self._places = [sample["image"] for sample in samples]
        if not samples:
            raise UserError(f"data.path={config.path} holds no image ({', '.join(IMAGES)}) in its tar files.")
        captions = [sample.get("captions", []) for sample in samples]
        labels = [sample.get(CLASS) for sample in samples]
        listing = Listing(len(samples), captions if any(captions) else None, dropped=dropped)
        if any(label is not None for label in labels):
            listing.labels, listing.class_names = labels, class_names(labels, config.class_names, f".{CLASS}")
        self._open(listing)

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | str]:
        file, now = None, None
        try:
            for place in (self._places[i] for i in listed):
                try:
                    if place.tar != now:
                        file, now = _reopened(file, place.tar), place.tar
                    file.seek(place.start)
                    content = file.read(place.size)
                except OSError:
                    content, now = b"", None
                yield content if len(content) == place.size else "missing file"
        finally:
            if file is not None:
                file.close()


def _reopened(before: BinaryIO | None, tar: Path) -> BinaryIO:
    if before is not None:
        before.close()
    return open_regular(tar)


def _samples(path: Path, dropped: collections.Counter[str]) -> list[dict[str, Any]]:
    """What each sample with an image in a tar has: its `image`, `captions` and class."""
    samples: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    with _opened(path) as (file, tar):
        while (member := tar.next()) is not None:
            # It would remember all of them.
            tar.members.clear()
            if member.size < 0:
                raise tarfile.ReadError("a negative size")
            name = PurePosixPath(member.name)
            stem, _, kind = name.name.partition(".")
            kind = kind.lower()
            if member.isdir() or not stem:
                continue
            if why := _unusable(member, name, kind):
                dropped[why] += 1
                continue
            sample = samples[str(name.with_name(stem))]
            if kind in IMAGES:
                dropped["second image of a sample"] += "image" in sample
                sample.setdefault("image", Place(path, member.offset_data, member.size))
            else:
                file.seek(member.offset_data)
                _tell(sample, kind, file.read(member.size), dropped)
    found = [sample for sample in samples.values() if "image" in sample]
    dropped["sample without an image"] += len(samples) - len(found)
    return found


def _unusable(member: tarfile.TarInfo, name: PurePosixPath, kind: str) -> str:
    if member.issym() or member.islnk():
        return "link in a tar"
    if name.is_absolute() or ".." in name.parts:
        return "name that leads out of its tar"
    if member.type not in tarfile.REGULAR_TYPES or member.issparse():
        return "entry that is no file"
    if kind not in (*IMAGES, *TEXTS, CLASS):
        return f".{kind[:20]} file" if kind else "nameless file"
    most = IMAGE_BYTES if kind in IMAGES else TEXT_BYTES
    return "too large" if member.size > most else ""


def _tell(sample: dict[str, Any], kind: str, content: bytes, dropped: collections.Counter[str]) -> None:
    """Put what a sample's file says into it; a caption of its own goes before that in its JSON."""
    try:
        text = content.decode("utf-8-sig")
        if kind == CLASS:
            label = int(text)
            # As in Parquet files, -1 is no class.
            sample[CLASS] = label if label >= 0 else None
            return
    except ValueError:
        dropped["unreadable text"] += 1
        return
    texts = captions_of(json_object(text)) if kind == "json" else captions_in(text)
    if texts and (kind != "json" or "captions" not in sample):
        sample["captions"] = texts


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, tarfile.TarFile]]:
    """A tar whose members can be walked once, after which it has been whole. Raises UserError where it is not."""
    try:
        with open_regular(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            yield file, tar
            # At a damaged header the walk simply ends.
            file.seek(tar.offset)
            end = file.read(BLOCK)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"data.path: {path} is no uncompressed tar, or only a part of one ({first_line(error)[:100]});"
            " copy it again, or unpack what was compressed."
        ) from None
    if end.strip(b"\0"):
        raise UserError(f"data.path: {path} is damaged before its end; copy it again.")


class _Headers:
    """A file as tarfile reads it, which is its headers alone: nothing long, whatever size they say."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)
