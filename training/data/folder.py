"""Images in folders, with captions beside them or classes by sub-folder."""

from __future__ import annotations

import collections
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.untrusted import read_regular
from training.data.reading import CAPTION_KEYS, captions_of, existing, json_object, lines, text_file
from training.data.stored import Files, Listing, Stored

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
# Of a file with an image's captions, one a line; the first that is there.
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
# Kinds of other files that are counted by their suffix; the rest are counted together.
KINDS = 5


class Folder(Stored):
    """PNG, JPEG and WebP files below a folder. Linked folders are not entered.

    Captions come from a .txt or .caption file of the same name, one a line, or from metadata.jsonl and metadata.csv
    files ("file_name", "text"); once one image has a caption, those without are dropped. Where all images lie in two
    or more sub-folders of `path`, their names are the classes.
    """

    Config = Files

    def __init__(self, config: Files) -> None:
        super().__init__(config)
        root = existing(config.path, directory=True)
        dropped: collections.Counter[str] = collections.Counter()
        images, beside, described = walk(root, dropped)
        if not images:
            raise UserError(f"data.path={root} holds no .png, .jpg or .webp file.")
        self._paths = sorted(images, key=lambda path: path.relative_to(root).parts)
        dropped["missing file"] += len(described.keys() - set(images))
        dropped["caption without an image"] += len(beside - {path.with_suffix("") for path in images})
        captions = [described.get(path) or beside_of(path.with_suffix("")) for path in self._paths]
        tops = [path.relative_to(root).parts[:-1][:1] for path in self._paths]
        names = tuple(sorted({top[0] for top in tops if top}))
        labels = [names.index(top[0]) for top in tops] if all(tops) and len(names) > 1 else None
        told = captions if any(captions) else None
        self._open(Listing(len(self._paths), told, labels, names, dropped))

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | str]:
        return (read(self._paths[i]) for i in listed)


def read(path: Path) -> bytes | str:
    """An encoded image, or why there is none."""
    try:
        return read_regular(path)
    except FileNotFoundError:
        return "missing file"
    except OSError as error:
        return f"unreadable file ({error.strerror})"


def walk(
    root: Path, dropped: collections.Counter[str]
) -> tuple[list[Path], set[Path], dict[Path, list[str]]]:
    """Images, files of captions without their suffixes, and the captions that metadata say by image. What begins with a
    dot is nobody's data and not counted.
    """
    images, beside = [], set()
    described: dict[Path, list[str]] = {}
    others: collections.Counter[str] = collections.Counter()
    for folder, folders, names in os.walk(root):
        seen = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        folders[:] = sorted(name for name in seen if not os.path.islink(os.path.join(folder, name)))
        dropped["linked folder"] += len(seen) - len(folders)
        for name in sorted(names):
            path, suffix = Path(folder, name), Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if name in METADATA:
                for image, texts in _metadata(path, dropped):
                    described.setdefault(image, []).extend(texts)
            elif suffix in IMAGE_SUFFIXES:
                images.append(path)
            elif suffix in CAPTION_SUFFIXES:
                beside.add(path.with_suffix(""))
            else:
                others[suffix] += 1
    for suffix, count in others.most_common(KINDS):
        dropped[f"{suffix or 'nameless'} file"] += count
    dropped["file of other kinds"] += others.total() - sum(count for _, count in others.most_common(KINDS))
    return images, beside, described


def _metadata(path: Path, dropped: collections.Counter[str]) -> Iterator[tuple[Path, list[str]]]:
    """The image and the captions of each entry. An image outside the folder is none of ours, and never opened."""
    for entry in _table(path) if path.suffix == ".csv" else _objects(path):
        if isinstance(entry.get("file_name"), str):
            yield Path(os.path.normpath(path.parent / entry["file_name"])), captions_of(entry)
        else:
            dropped["metadata line without a file_name"] += 1


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    return (json_object(line) for line in lines(path) if line.strip())


def _table(path: Path) -> Iterator[dict[str, Any]]:
    table = csv.DictReader(f"{line}\n" for line in lines(path))
    try:
        columns = table.fieldnames or []
        if "file_name" not in columns or not set(CAPTION_KEYS) & set(columns):
            raise UserError(
                f"{path} has the columns {', '.join(columns)}; file_name is needed, and one of {', '.join(CAPTION_KEYS)}."
            )
        yield from table
    except csv.Error as error:
        raise UserError(
            f"{path}, line {table.line_num}: no table of comma-separated values ({error})."
        ) from None


def beside_of(stem: Path) -> list[str]:
    """The captions in the file that has this name but for its suffix."""
    return next((texts for suffix in CAPTION_SUFFIXES if (texts := text_file(Path(f"{stem}{suffix}")))), [])
