"""Captions in a file that a person has, and which image each belongs to."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from evaluation.names import in_known_order
from evaluation.pickles import refuse_pickle
from evaluation.references import LATER, UNHASHED, find
from evaluation.settings import Place
from stepdistill.errors import UserError

_SUFFIXES = (".txt", ".jsonl", ".json", ".csv")
# What a caption, and the image it belongs to, are called in people's files; the first that is there.
_TEXT = ("prompt", "caption", "text")
_IMAGE = ("file_name", "filename", "file", "image", "image_path", "path", "name", "id")
# Captions at each end that a pin is of.
_ENDS = 20


@dataclass(frozen=True)
class Caption:
    """A caption and the name of its image, "" where the file does not say it."""

    text: str
    image: str = ""


@dataclass(frozen=True)
class CaptionFile:
    """`n` captions in a fixed order, in a file that a person has.

    .txt: one a line. .jsonl: an object a line with "prompt", "caption" or "text". .csv: with such a column. .json: a
    list of such objects or of strings, an object of objects (MJHQ-30K's meta_data.json), or COCO annotations, of
    which each image's caption with the lowest id is taken, by image id.

    content: sha256 of all captions. ends, characters: sha256 of the first and last 20, and the length of the .txt file,
    where a public file is known by these.
    seed: draw the `n` from a longer file, without replacement; -1: the file has `n`. files: what to download.
    """

    name: str
    n: int
    # For a person's own: what they are called identifies nothing.
    content: str = field(default="", metadata=LATER)
    ends: str = field(default="", metadata=LATER)
    characters: int = field(default=0, metadata=UNHASHED)
    seed: int = field(default=-1, metadata=LATER)
    about: str = field(default="", metadata=UNHASHED)
    files: tuple[str, ...] = field(default=(), metadata=UNHASHED)
    path: str = field(default="", metadata=UNHASHED)

    @classmethod
    def open(cls, path: Place, n: int | None = None, seed: int = -1) -> CaptionFile:
        """A person's own captions, `n` of them drawn with `seed` if one is given. Raises UserError when the file is
        none, has an empty one, or too few.
        """
        count = len(read_captions(Path(path)))
        known = cls("own", n if seed >= 0 and n else count, seed=seed, path=str(path))
        _check_count(known, count)
        return replace(known, content=known.sha256())

    def located(self, path: Place | None = None) -> CaptionFile:
        """The same with its `path`, searched for unless given, and read once. Raises UserError if it is in no place
        that was looked at, is none, has not `n` captions or an empty one, or is another file than the protocol fixes.
        """
        place = find(path, self.name, _SUFFIXES, "the captions", self.about, "--captions")
        known = replace(self, path=str(place))
        captions = read_captions(place)
        _check_count(known, len(captions))
        got, other = _sha256(captions[:_ENDS] + captions[-_ENDS:]), ""
        if self.ends and self.ends != got:
            other = f"the sha256 of the first and last {_ENDS} begins with {got[:8]}, not {self.ends[:8]}"
        elif self.characters and place.suffix == ".txt":
            length = len(place.read_text(encoding="utf-8").rstrip("\n")) + 1
            other = f"it has {length} characters, not {self.characters}" if length != self.characters else ""
        if other:
            raise UserError(f"{place} holds other captions than {self.name}: {other}; {self.about}")
        return known

    def read(self) -> tuple[str, ...]:
        if not self.path:
            raise UserError(f"the captions {self.name} are missing; give their file with --captions.")
        captions = read_captions(Path(self.path))
        if self.seed < 0:
            return captions
        chosen = np.random.default_rng(self.seed).permutation(len(captions))[: self.n]
        return tuple(captions[index] for index in chosen)

    def sha256(self) -> str:
        """Of the captions themselves; "" while the file is not known."""
        return _sha256(self.read()) if self.path else ""


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions in a file; see `CaptionFile`. Raises UserError naming the line that is none."""
    return tuple(caption.text for caption in captions_in(path))


def captions_in(path: Path) -> list[Caption]:
    """The captions in a file with their images. Raises UserError as `read_captions` does."""
    refuse_pickle(path, "captions")
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                entries: list[Any] = list(csv.DictReader(file))
        else:
            text = path.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if line.strip() or path.suffix != ".jsonl"]
            if path.suffix == ".json":
                entries = _json_entries(json.loads(text), path)
            else:
                entries = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except OSError as error:
        raise UserError(f"the captions {path} cannot be read ({error.strerror}).") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"the captions {path} are not UTF-8 text or JSON ({error}).") from None
    return [_caption(entry, number, path) for number, entry in enumerate(entries, 1)]


def paired(path: Path, names: Sequence[str], count: int, what: str) -> list[str]:
    """A caption for each of `count` images: by name where the file of captions names images, else by order.

    names: of the images; [] where their order is fixed without one. Raises UserError if an image has no caption, there
    are more or fewer captions than images, or the names of the images don't say which caption is whose.
    """
    captions = captions_in(path)
    for form in (str, lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem):
        by_name = {form(caption.image): caption.text for caption in reversed(captions) if caption.image}
        missing = [name for name in names if form(name) not in by_name]
        if names and not missing and len({form(name) for name in names}) == len(names):
            return [by_name[form(name)] for name in names]
        if names and by_name and len(missing) < len(names):
            raise UserError(
                f"{path} has no caption for {missing[0]} of {what}; {len(missing)} images lack one."
            )
    if len(captions) != count:
        raise UserError(
            f"{path} has {len(captions)} captions for the {count} images of {what}; give one each."
        )
    if names and not in_known_order(list(names)):
        raise UserError(
            f"the names of {what}, like {names[0]}, don't say which of the captions in {path} is whose; number the "
            "images, or give a .jsonl or .csv file with file_name and caption."
        )
    return [caption.text for caption in captions]


def _caption(entry: Any, number: int, path: Path) -> Caption:
    image = ""
    if isinstance(entry, dict):
        image = str(next((entry[key] for key in _IMAGE if entry.get(key) is not None), ""))
        entry = next((entry[key] for key in _TEXT if key in entry), None)
    if not isinstance(entry, str) or not entry.strip():
        raise UserError(f"caption {number} of {path} is empty or missing; every sample needs one.")
    return Caption(entry.strip(), image)


def _json_entries(content: Any, path: Path) -> list[Any]:
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return _coco(content, path)
    if isinstance(content, dict):
        return [
            {"name": key, **value} if isinstance(value, dict) else value for key, value in content.items()
        ]
    if not isinstance(content, list):
        raise UserError(
            f"{path} holds {str(content)[:40]}, which is no captions; give a list or an object of them."
        )
    return content


def _coco(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    try:
        files = {image["id"]: image["file_name"] for image in content.get("images", ())}
        first: dict[int, dict[str, Any]] = {}
        for entry in content["annotations"]:
            known = first.get(entry["image_id"])
            if "caption" not in entry:
                raise UserError(
                    f"{path} holds COCO's annotations without captions; give captions_*.json instead."
                )
            if known is None or entry["id"] < known["id"]:
                first[entry["image_id"]] = entry
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of COCO annotations ({type(error).__name__}: {error}).") from None
    return [
        {"caption": first[image]["caption"], "file_name": files.get(image, str(image))}
        for image in sorted(first)
    ]


def _check_count(captions: CaptionFile, count: int) -> None:
    enough = count >= captions.n if captions.seed >= 0 else count == captions.n
    if not enough:
        raise UserError(
            f"{captions.path} has {count} captions, but the protocol's {captions.name} has {captions.n}; "
            f"{captions.about}"
        )


def _sha256(captions: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()
