"""Examples as the library `datasets` streams them: files read one after another, a few of which are in memory at a time."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.errors import UserError, first_line, nearest
from training.data.base import Source, Unreadable, at_least, digest, facts, image_size, order
from training.data.buckets import Size
from training.data.decoding import Cut, decoded
from training.data.parquet import opened, refuse_bomb, texts_of
from training.data.reading import CAPTION_KEYS, existing, files_of

# The library's reader of each kind of file.
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
# Rows handed over at a time; bytes at a file's end that its checksum covers, where Parquet keeps its table of contents.
ROWS, END = 256, 1 << 16

# The encoded image, "" without; its captions.
Row = tuple[bytes, list[str]]


class Datasets(Source):
    """Parquet files, or JSON files of an object a line, of any number: `path` is one file or a folder of them.

    An epoch goes through the files in a random order, `files` of them at a time, whose examples are mixed. Which comes next
    follows from the seed and from how many were drawn. Nothing is decoded before it is asked for. Every process reads every
    file; files of a few thousand examples are best.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What is read.

        Attributes:
            path: where the files lie.
            image_column: None = image or img, if there is one; in JSON there are no images.
            caption_column: None = text, caption or prompt, or one of these for several, if there is one.
            resolution: [height, width] in pixels that images are cut and resized to, at least 8, or the side of a square.
            min_size: images whose shorter side is below this are left out when they come; 0 = keep and enlarge.
            files: whose examples are mixed. Up to twice as many are in memory, encoded.

        Raises:
            ValueError: a number is too small.
        """

        path: Path
        image_column: str | None = None
        caption_column: str | None = None
        resolution: int | Size = 64
        min_size: int = 0
        files: int = 4

        def __post_init__(self) -> None:
            at_least(8, resolution=min(image_size(self.resolution)))
            at_least(0, min_size=self.min_size)
            at_least(1, files=self.files)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.library = _library()
        path = existing(config.path)
        kinds = [kind for kind in KINDS if path.suffix == kind or any(path.rglob(f"*{kind}"))]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none"
            raise UserError(
                f"data.path={config.path} must hold files of one kind of {', '.join(KINDS)}, and has {found}."
            )
        self.kind, self.files = kinds[0], files_of(path, kinds[0])
        # The library would take them for patterns, or for places elsewhere.
        if odd := [file for file in self.files if set("*?[]") & set(str(file)) or "::" in str(file)]:
            raise UserError(f"data.path: {odd[0]} has one of * ? [ ] :: in its name; rename it.")
        self._columns(self.files[0])
        self.lengths = np.array([self._length(file) for file in self.files], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.size = int(self._starts[-1])
        if not self.size:
            raise UserError(f"data.path={config.path} holds no rows.")
        self.captions = _Captions(self) if self._text else None
        self.counts = {"kept": self.size}
        self._held: collections.OrderedDict[int, list[Row]] = collections.OrderedDict()
        self._cuts: dict[int, Cut] = {}

    # ------------------------------------------------------------------------------------------------ the order

    def order(self, seed: int, size: int, first: int, count: int) -> list[int]:
        """Of the contract of `training.data.order`: every example once an epoch, each epoch from (seed, epoch) alone."""
        found: list[int] = []
        while count:
            epoch, at = divmod(first, size)
            ends = np.cumsum([len(window) for window in self._windows(seed, epoch)])
            number = int(np.searchsorted(ends, at, side="right"))
            window = self._windows(seed, epoch)[number]
            begin = int(ends[number]) - len(window)
            taken = _mixed(seed, epoch, number, len(window))[at - begin : at - begin + count]
            found += [window[i] for i in taken]
            first, count = first + len(taken), count - len(taken)
        return found

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as its run
    def _windows(self, seed: int, epoch: int) -> list[_Window]:
        """The files of an epoch, as many at a time as are mixed."""
        files, most = (
            order(seed, len(self.files), epoch * len(self.files), len(self.files)),
            self.config.files,
        )
        groups = [files[i : i + most] for i in range(0, len(files), most)]
        windows = [_Window([range(self._starts[f], self._starts[f + 1]) for f in group]) for group in groups]
        return [window for window in windows if len(window)]

    # ------------------------------------------------------------------------------------------------- the rows

    def images(self, indices: Sequence[int]) -> np.ndarray:
        if not self.has_images:
            return super().images(indices)
        self._cuts = {index: self._cut(int(index)) for index in indices}
        return np.stack([self._cuts[index].pixels for index in indices])

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """As the contract says, of images that were just asked for."""
        cuts = [self._cuts[index] for index in indices]
        return np.array([(*cut.original, *cut.corner, *self.image_size) for cut in cuts], np.int64)

    def caption(self, index: int, use: int = 0) -> str:
        texts = self._row(index)[1]
        return texts[(index + use) % len(texts)] if texts else ""

    def all_captions(self) -> Iterator[str]:
        for file in self.files if self._text else ():
            for _, texts in self._rows(file):
                yield from texts

    def fingerprint(self) -> str:
        """Of every file's name, size, length and end: all of it would take as long as an epoch."""
        parts: list[str | bytes] = [facts(self.config)]
        for file, length in zip(self.files, self.lengths, strict=True):
            with open(file, "rb") as content:
                content.seek(max(0, (size := file.stat().st_size) - END))
                parts += [file.name, f"{size} {length}", content.read()]
        return digest(parts)

    def _cut(self, index: int) -> Cut:
        found = decoded(self._row(index)[0], [self.image_size], self.config.min_size)
        if isinstance(found, str):
            raise Unreadable(index, f"data.path={self.config.path}: row {index} has {found}")
        return found

    def _row(self, index: int) -> Row:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        if file not in self._held:
            try:
                self._held[file] = list(self._rows(self.files[file]))
            except UserError as error:
                raise Unreadable(index, str(error)) from None
            if len(self._held) > 2 * self.config.files:
                self._held.popitem(last=False)
        self._held.move_to_end(file)
        rows, at = self._held[file], index - int(self._starts[file])
        if at >= len(rows):
            raise Unreadable(index, f"data.path: {self.files[file]} has fewer rows than it had")
        return rows[at]

    def _rows(self, file: Path) -> Iterator[Row]:
        wanted = [column for column in (self._image, self._text) if column]
        for table in self._tables(file, wanted):
            texts = texts_of(table[self._text]) if self._text else [[]] * len(table)
            images = table[self._image].to_pylist() if self._image else [b""] * len(table)
            for image, captions in zip(images, texts, strict=True):
                # A path in place of bytes leads to a file that nobody named.
                content = image.get("bytes") if isinstance(image, dict) else image
                yield content if isinstance(content, bytes) else b"", captions

    def _tables(self, file: Path, columns: list[str] | None) -> Iterator[Any]:
        """Arrow tables of a file's rows, as the library streams them; nothing in them is decoded."""
        try:
            if self.kind == ".parquet":
                with opened(file) as parquet:
                    refuse_bomb(file, parquet.metadata)
            stream = self.library.load_dataset(
                KINDS[self.kind], data_files=[str(file)], split="train", streaming=True
            )
            stream = stream.select_columns(columns) if columns else stream
            yield from stream.with_format("arrow").iter(batch_size=ROWS)
        except UserError:
            raise
        except Exception as error:
            # The library has its own exception for nearly everything.
            raise UserError(
                f"data.path: {file} cannot be streamed ({first_line(error)[:150]}); copy it again."
            ) from None

    def _length(self, file: Path) -> int:
        if self.kind != ".parquet":
            return sum(len(table) for table in self._tables(file, None))
        with opened(file) as parquet:
            return parquet.metadata.num_rows

    def _columns(self, file: Path) -> None:
        names = next((table.column_names for table in self._tables(file, None)), [])
        self._image = _column("image_column", names, self.config.image_column, ("image", "img"))
        self._text = _column("caption_column", names, self.config.caption_column, CAPTION_KEYS)
        if self.kind != ".parquet":
            self._image = None
        self.has_images = self._image is not None
        if not (self._image or self._text):
            raise UserError(
                f"data.path: {file} has neither images nor captions; set data.image_column or data.caption_column to one of"
                f" {', '.join(names)}."
            )


class _Window(Sequence):
    """The examples of a few files, by number."""

    def __init__(self, parts: Sequence[range]) -> None:
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> int:
        part = int(np.searchsorted(self.ends, number, side="right"))
        return int(self.parts[part][number - int(self.ends[part])])


class _Captions(Sequence):
    """The first caption of every example, read when it is asked for."""

    def __init__(self, source: Datasets) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        texts = self.source._row(number)[1]
        return texts[0] if texts else ""


@functools.lru_cache(maxsize=4)
def _mixed(seed: int, epoch: int, window: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, window)).permutation(count)


def _column(field: str, names: Sequence[str], asked: str | None, usual: Sequence[str]) -> str | None:
    if asked is not None and asked not in names:
        raise UserError(
            f"data.{field}={asked} is no column; there are {', '.join(names)}.{nearest(asked, names)}"
        )
    return asked or next((name for name in usual if name in names), None)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.name=datasets needs the package datasets, which is not installed: pip install 'stepdistill[datasets]';"
            " data.name=parquet reads Parquet without it."
        ) from None
    return datasets
