"""Images in Parquet files, as the Hugging Face libraries write them."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.errors import UserError, nearest
from training.data.base import existing
from training.data.stored import Files, Stored


class Parquet(Stored):
    """Parquet in the Hugging Face layout: images as {bytes, path} or bytes, and columns of text and labels.

    `path` is one file or a folder of them.
    """

    @dataclass(frozen=True)
    class Config(Files):
        """Which columns hold what.

        Attributes:
            image_column: None = image, or img.
            caption_column: None = text or caption, if there is one.
            label_column: None = label, if there is one.
            class_names: () = those in the file's Hugging Face metadata, else the numbers.
        """

        image_column: str | None = None
        caption_column: str | None = None
        label_column: str | None = None
        class_names: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        path = existing(config.path)
        self._files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self._files:
            raise UserError(f"data.path={path} holds no .parquet file.")
        # File, row group, number of its first row.
        self._groups: list[tuple[Path, int, int]] = []
        self._cached: collections.OrderedDict[int, list[bytes | None]] = collections.OrderedDict()
        captions, labels, total = [], [], 0
        for file in self._files:
            parquet = _parquet(file)
            schema = parquet.schema_arrow
            if file == self._files[0]:
                self._image = _column(
                    schema, "image_column", config.image_column, ("image", "img"), required=True
                )
                text = _column(schema, "caption_column", config.caption_column, ("text", "caption"))
                label = _column(schema, "label_column", config.label_column, ("label",))
                names = tuple(config.class_names) or _hugging_face_classes(schema, label)
            wanted = [column for column in (text, label) if column]
            for column in (self._image, *wanted):
                if column not in schema.names:
                    raise UserError(
                        f"data.path: {file} has no column {column!r}, which {self._files[0].name} has."
                    )
            for group in range(parquet.num_row_groups):
                self._groups.append((file, group, total))
                total += parquet.metadata.row_group(group).num_rows
                table = parquet.read_row_group(group, columns=wanted) if wanted else None
                captions += table[text].to_pylist() if text else []
                labels += table[label].to_pylist() if label else []
        if total == 0:
            raise UserError(f"data.path={path} holds no rows.")
        if text:
            captions = [value.strip() if isinstance(value, str) else None for value in captions]
        if label:
            labels, names = _classes(labels, names, label)
        self._total = total
        self._open(captions if text else None, labels if label else None, names, total, collections.Counter())

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | None]:
        starts = [first for _, _, first in self._groups]
        for i in listed:
            group = int(np.searchsorted(starts, i, side="right")) - 1
            yield self._encoded(group)[i - starts[group]]

    def _encoded(self, group: int) -> list[bytes | None]:
        """The encoded images of one row group; the last few groups stay in memory."""
        if group not in self._cached:
            file, number, _ = self._groups[group]
            column = _parquet(file).read_row_group(number, columns=[self._image])[self._image]
            values = column.to_pylist()
            self._cached[group] = [
                value.get("bytes") if isinstance(value, dict) else value for value in values
            ]
            if len(self._cached) > 2:
                self._cached.popitem(last=False)
        self._cached.move_to_end(group)
        return self._cached[group]


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid:
        raise UserError(f"data.path: {path} is not a Parquet file, or only a part of one.") from None


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
    count = max((value for value in labels if value is not None), default=-1) + 1
    if names and len(names) < count:
        raise UserError(
            f"data.class_names has {len(names)} names, but the labels in {column} reach {count - 1}."
        )
    return labels, names or tuple(map(str, range(count)))
