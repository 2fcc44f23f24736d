"""Images in Parquet files, as the Hugging Face libraries write them."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.errors import UserError, first_line, nearest
from stepdistill.untrusted import open_regular
from training.data.reading import CAPTION_KEYS, captions_of, files_of
from training.data.stored import Files, Listing, Stored, class_names

# Rows read at a time, fewer where their images are large; bytes of them, and of what is read ahead of them.
ROWS, BATCH_BYTES, BUFFER = 256, 64 << 20, 1 << 20
# What a file of images has at least of bytes for each value, unless its values are few, and by how much it can grow when
# it is unpacked.
LEAST_BYTES, FEW_ROWS, MOST_RATIO = 8, 1_000_000, 100


class Parquet(Stored):
    """Parquet in the Hugging Face layout: images as {bytes, path} or bytes, and columns of text and labels. A text may be
    a list of several. `path` is one file or a folder of them.
    """

    @dataclass(frozen=True)
    class Config(Files):
        """Which columns hold what.

        Attributes:
            image_column: None = image, or img.
            caption_column: None = text, caption or prompt, or one of these for several, if there is one.
            label_column: None = label, if there is one.
            class_names: () = those in the file's Hugging Face metadata, else the numbers.
        """

        image_column: str | None = None
        caption_column: str | None = None
        label_column: str | None = None
        class_names: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # File, row group, number of its first row.
        self._groups: list[tuple[Path, int, int]] = []
        listing, texts, labels = Listing(0), [], []
        seen: dict[str, list[str]] = {}
        text = label = None
        for file in files_of(config.path, ".parquet"):
            with opened(file) as parquet:
                schema = parquet.schema_arrow
                if not self._groups and text is label is None:
                    self._image = _column(schema, "image_column", config.image_column, ("image", "img"), True)
                    text = _column(schema, "caption_column", config.caption_column, CAPTION_KEYS)
                    label = _column(schema, "label_column", config.label_column, ("label",))
                    names, first = tuple(config.class_names) or _hugging_face_classes(schema, label), file
                wanted = [column for column in (text, label) if column]
                for column in (self._image, *wanted):
                    if column not in schema.names:
                        raise UserError(
                            f"data.path: {file} has no column {column!r}, which {first.name} has."
                        )
                refuse_bomb(file, parquet.metadata)
                for group in range(parquet.num_row_groups):
                    self._groups.append((file, group, listing.total))
                    listing.total += parquet.metadata.row_group(group).num_rows
                    for table in parquet.iter_batches(ROWS, [group], wanted) if wanted else ():
                        texts += texts_of(table[text], seen) if text else []
                        labels += _values(table[label]) if label else []
        if listing.total == 0:
            raise UserError(f"data.path={config.path} holds no rows.")
        listing.captions = texts if text else None
        if label:
            listing.labels, listing.class_names = _classes(labels, names, label)
        self._open(listing)

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | str]:
        starts = [first for _, _, first in self._groups]
        groups = (int(np.searchsorted(starts, i, side="right")) - 1 for i in listed)
        for group, wanted in itertools.groupby(zip(groups, listed, strict=True), key=lambda pair: pair[0]):
            yield from self._encoded(group, [i - starts[group] for _, i in wanted])

    def _encoded(self, group: int, wanted: Sequence[int]) -> Iterator[bytes | str]:
        """The encoded images in these rows of a row group, in order; of others there are never more than a few at once."""
        file, number, _ = self._groups[group]
        with opened(file) as parquet:
            said = parquet.metadata.row_group(number)
            each = max(1, said.total_byte_size // max(1, said.num_rows))
            size, first, rows = max(1, min(ROWS, BATCH_BYTES // each)), 0, collections.deque(wanted)
            for table in parquet.iter_batches(size, [number], [self._image]):
                column = table.column(0)
                while rows and rows[0] < first + len(column):
                    value = column[rows[0] - first].as_py()
                    value = value.get("bytes") if isinstance(value, dict) else value
                    yield value if isinstance(value, bytes) and value else "no image bytes"
                    # The same row may be wanted twice.
                    rows.popleft()
                first += len(column)
                if not rows:
                    return
        if rows:
            raise UserError(f"data.path: {file} holds fewer rows than it says; copy it again.")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A Parquet file whose texts and bytes are read as dictionaries, so that many equal ones are held once.

    Raises:
        UserError: for whatever the library says of a damaged file, also while it is read.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_regular(file) as content:
            schema = ParquetFile(content).schema
            columns = [schema.column(i) for i in range(len(schema))]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
            content.seek(0)
            yield ParquetFile(content, read_dictionary=texts, pre_buffer=False, buffer_size=BUFFER)
    except pyarrow.ArrowInvalid as error:
        if "Parquet magic bytes" not in str(error) and "Parquet file size" not in str(error):
            raise _damaged(file, error) from None
        raise UserError(f"data.path: {file} is not a Parquet file, or only a part of one.") from None
    except (OSError, ValueError, TypeError, OverflowError, IndexError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"data.path: {file} cannot be read ({error.strerror}).")
    return UserError(f"data.path: {file} is damaged ({first_line(error)[:150]}); copy it again.")


def refuse_bomb(file: Path, metadata: Any) -> None:
    """Images hardly compress, and each takes some bytes: a file that says otherwise would fill the memory."""
    size = file.stat().st_size
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        most = max([group.num_rows, *(chunk.num_values for chunk in chunks)])
        unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
        if most > max(size // LEAST_BYTES, FEW_ROWS) or unpacked > max(MOST_RATIO * size, BATCH_BYTES):
            raise UserError(
                f"data.path: {file} says it holds {most:,} values in {unpacked:,} bytes, and has {size:,} bytes itself;"
                " no images do."
            )


def _values(column: Any) -> list:
    """The values of an Arrow array, equal ones of a dictionary as one object."""
    import pyarrow

    if not pyarrow.types.is_dictionary(column.type):
        return column.to_pylist()
    entries = column.dictionary.to_pylist()
    return [None if i is None else entries[i] for i in column.indices.to_pylist()]


def texts_of(column: Any, seen: dict[str, list[str]] | None = None) -> list[list[str]]:
    """The captions in each row of an Arrow array of texts or lists of texts; those of equal texts are one object, which
    `seen` remembers.
    """
    import pyarrow

    seen = {} if seen is None else seen
    column = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        each, ends = texts_of(column.values, seen), column.offsets.to_pylist()
        return [list(itertools.chain(*each[start:end])) for start, end in itertools.pairwise(ends)]
    rows = [value if isinstance(value, str) else "" for value in _values(column)]
    for text in set(rows) - seen.keys():
        seen[text] = captions_of(text)
    return [seen[text] for text in rows]


def _column(
    schema: Any, field: str, asked: str | None, usual: Sequence[str], required: bool = False
) -> str | None:
    if asked is not None:
        if asked not in schema.names:
            listed = ", ".join(schema.names)
            raise UserError(
                f"data.{field}={asked} is no column; there are {listed}.{nearest(asked, schema.names)}"
            )
        return asked
    for name in usual:
        if name in schema.names:
            return name
    if required:
        raise UserError(
            f"there is no column {' or '.join(usual)}; set data.{field} to one of {', '.join(schema.names)}."
        )
    return None


def _hugging_face_classes(schema: Any, label: str | None) -> tuple[str, ...]:
    try:
        return tuple(json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _classes(values: list, names: tuple[str, ...], column: str) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels as class numbers, None where there is none, and a name for every class."""
    present = {value for value in values if value is not None}
    if all(isinstance(value, str) for value in present):
        names = names or tuple(sorted(present))
        number = {name: i for i, name in enumerate(names)}
        return [number.get(value) for value in values], names
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in present):
        raise UserError(f"data.label_column={column} must hold whole numbers or text.")
    # -1 means unlabelled.
    labels = [value if value is not None and value >= 0 else None for value in values]
    return labels, class_names(labels, names, column)
