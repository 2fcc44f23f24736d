"""Captions in a file that a person has."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluation.references import LATER, UNHASHED, find
from stepdistill.errors import UserError

_SUFFIXES = (".txt", ".jsonl", ".json")


@dataclass(frozen=True)
class CaptionFile:
    """`n` captions in a fixed order, in a file that a person has.

    .txt: one a line. .jsonl: an object a line with "prompt" or "caption". .json: a list of such objects or
    of strings, an object of objects (MJHQ-30K's meta_data.json), or COCO annotations, of which each image's
    caption with the lowest id is taken, by image id.
    """

    name: str
    n: int
    # sha256 of the captions, for a person's own: what they are called identifies nothing.
    content: str = field(default="", metadata=LATER)
    about: str = field(default="", metadata=UNHASHED)
    path: str = field(default="", metadata=UNHASHED)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CaptionFile:
        """A person's own captions. Raises UserError when the file is none, or has an empty one."""
        known = cls("own", len(read_captions(Path(path))), path=str(path))
        return replace(known, content=known.sha256())

    def found(self, path: str | os.PathLike[str] | None = None) -> CaptionFile:
        """The same with its `path`, searched for unless given, and read once.

        Raises:
            UserError: it is in no place that was looked at, is none, has not `n` captions or an empty one.
        """
        place = find(path, self.name, _SUFFIXES, "the captions", self.about, "--captions")
        known = replace(self, path=str(place))
        if (count := len(known.read())) != self.n:
            raise UserError(
                f"{place} has {count} captions, but the protocol's {self.name} has {self.n}; {self.about}"
            )
        return known

    def read(self) -> tuple[str, ...]:
        if not self.path:
            raise UserError(f"the captions {self.name} are missing; give their file with --captions.")
        return read_captions(Path(self.path))

    def sha256(self) -> str:
        """Of the captions themselves; "" while the file is not known."""
        return hashlib.sha256("\n".join(self.read()).encode()).hexdigest() if self.path else ""


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions in a file; see `CaptionFile`. Raises UserError naming the line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            entries = _json_captions(json.loads(text))
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = text.splitlines()
    except OSError as error:
        raise UserError(f"the captions {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"the captions {path} are not UTF-8 text or JSON ({error}).") from None
    found = []
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, dict):
            entry = entry.get("prompt", entry.get("caption"))
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"caption {number} of {path} is empty or missing; every sample needs one.")
        found.append(entry.strip())
    return tuple(found)


def _json_captions(content: Any) -> list[Any]:
    # COCO.
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        first: dict[int, dict[str, Any]] = {}
        for entry in content["annotations"]:
            kept = first.get(entry["image_id"])
            if kept is None or entry["id"] < kept["id"]:
                first[entry["image_id"]] = entry
        return [first[image] for image in sorted(first)]
    return list(content.values()) if isinstance(content, dict) else list(content)
