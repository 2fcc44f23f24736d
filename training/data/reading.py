"""How sources read the files they are given: regular ones only, text a line at a time, captions in every usual form."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError, nearest
from stepdistill.untrusted import open_regular, read_regular

# Of a caption's file and of one line of a list: what is longer is no text for a text encoder.
TEXT_BYTES = 1 << 20
# Names of the caption, or captions, in a JSON object or a table, the first that is there.
CAPTION_KEYS = ("text", "caption", "prompt", "texts", "captions", "prompts")


def existing(path: Path, directory: bool | None = None) -> Path:
    """`path`, if there is a file or, as asked, a directory; else UserError with what has a similar name."""
    path = Path(path).expanduser()
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.path={path} does not exist.{nearest(path.name, beside)}")
    if directory is not None and path.is_dir() != directory:
        raise UserError(f"data.path={path} must be a {'folder' if directory else 'file'}.")
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"data.path={path} is a pipe or a device; give a regular file.")
    return path


def files_of(path: Path, suffix: str) -> list[Path]:
    """`path` itself if it is a file, else the regular files below it that end in `suffix`, by name; UserError where
    there are none.
    """
    path = existing(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
    if not files:
        raise UserError(f"data.path={path} holds no {suffix} file.")
    return files


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, one after another. Raises UserError if it is not UTF-8 or none that can be read."""
    number = 0
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            while line := file.readline(TEXT_BYTES):
                number += 1
                if len(line) == TEXT_BYTES:
                    raise UserError(f"line {number} of {path} has more than {TEXT_BYTES >> 20} MiB.")
                yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def text_file(path: Path) -> list[str]:
    """The captions in a file beside an image, one a line; [] where there is no such file."""
    try:
        return captions_in(read_regular(path, TEXT_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise UserError(f"the caption {path} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"the caption {path} cannot be read ({error.strerror}).") from None


def json_object(text: str) -> dict[str, Any]:
    """The object that JSON text holds, {} for anything else."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def captions_in(text: str) -> list[str]:
    """The lines of a text that hold something, with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def captions_of(value: Any) -> list[str]:
    """The captions in an entry: of a text, of a list of texts, or of the first of `CAPTION_KEYS` that an object has;
    with single spaces, without empty ones.
    """
    if isinstance(value, dict):
        return next((found for key in CAPTION_KEYS if (found := captions_of(value.get(key)))), [])
    if isinstance(value, str):
        text = " ".join(value.split())
        return [text] if text else []
    listed = value if isinstance(value, (list, tuple)) else ()
    return [text for each in listed if isinstance(each, str) for text in captions_of(each)]
