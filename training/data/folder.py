"""Images in folders, with captions beside them or classes by sub-folder."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepdistill.errors import UserError
from training.data.base import caption_of, existing, json_object, lines
from training.data.stored import Files, Stored

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class Folder(Stored):
    """PNG, JPEG and WebP files below a folder.

    Captions come from a .txt file of the same name, or from metadata.jsonl files ("file_name", "text"); once
    one image has a caption, those without are dropped. Where all images lie in two or more sub-folders of
    `path`, their names are the classes.
    """

    Config = Files

    def __init__(self, config: Files) -> None:
        super().__init__(config)
        root = existing(config.path, directory=True)
        dropped: collections.Counter[str] = collections.Counter()
        images, described = [], {}
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            for name in sorted(names):
                path = Path(folder, name)
                if name == "metadata.jsonl":
                    described.update(_metadata(path, dropped))
                elif path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    images.append(path)
        if not images:
            raise UserError(f"data.path={root} holds no .png, .jpg or .webp file.")
        self._paths = sorted(images, key=lambda path: path.relative_to(root).parts)
        dropped["missing file"] += len(described.keys() - set(images))
        captions = [described.get(path) or _text_beside(path) for path in self._paths]
        tops = [path.relative_to(root).parts[:-1][:1] for path in self._paths]
        names = tuple(sorted({top[0] for top in tops if top}))
        labels = [names.index(top[0]) for top in tops] if all(tops) and len(names) > 1 else None
        self._open(captions if any(captions) else None, labels, names, len(self._paths), dropped)

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | None]:
        for i in listed:
            try:
                yield self._paths[i].read_bytes()
            except OSError:
                yield None


def _metadata(path: Path, dropped: collections.Counter[str]) -> dict[Path, str]:
    captions = {}
    for line in lines(path):
        entry = json_object(line)
        if isinstance(entry.get("file_name"), str):
            captions[Path(os.path.normpath(path.parent / entry["file_name"]))] = caption_of(entry)
        elif line.strip():
            dropped["metadata line without a file_name"] += 1
    return captions


def _text_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    try:
        return " ".join(beside.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise UserError(f"the caption {beside} is not UTF-8 text.") from None
