"""What every command does with wrong input and half-written files.

A mistake of the user is a `UserError`: one sentence that names the field, the value and what to do. Commands
wrap their `main` in `cli_errors()`, so such a mistake ends with exit code 2 and no traceback, and an
interruption with 130.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

# Of a disk without room, and of a quota that is used up.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Of a place that is read-only or not ours, and of a disk that fails.
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Interrupted(KeyboardInterrupt):
    """A run was asked to end by a signal, and has saved what it had. Commands exit with 128 + its number."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = int(number)


# Characters of a message, beyond which its middle is left out: what it quotes may be a whole file.
LONGEST = 2000


class UserError(Exception):
    """Wrong input. The message is one sentence for the person who typed it.

    It may quote what a file holds: no longer than fits a screen, and nothing that would move a terminal's cursor.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        super().__init__("".join(shown))


def nearest(name: str, choices: Iterable[str]) -> str:
    """The sentence " Did you mean 'x'?" for the closest of `choices`, or "" when nothing is close."""
    if len(str(name)) > 200:
        return ""
    match = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """What a library's exception says, for the end of a sentence: its type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no details'}"


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turn the failures a person can act on into one line on stderr and an exit code.

    `UserError`, a full disk and a place that cannot be written to exit 2, Ctrl-C exits 130, and a signal that a run has
    obeyed 128 + its number. Anything else is a defect of ours and keeps its traceback. From here on a file name that is no
    UTF-8 can be printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", int(signal.SIGINT))
        print(
            f"interrupted{'' if number == signal.SIGINT else f' by {signal.Signals(number).name}'}",
            file=sys.stderr,
        )
        raise SystemExit(128 + number) from None
    except OSError as error:
        if error.errno in _UNWRITABLE and error.filename:
            print(
                f"error: {error.filename} cannot be written or read ({os.strerror(error.errno)}); choose another place, or"
                " mend this one.",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        if error.errno not in FULL_DISK:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: the disk is full{where}; free some space and run the same command again.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def full_disk(error: Exception, path: str | os.PathLike[str]) -> OSError | None:
    """The OSError behind what a library that is not Python's says of a full disk; None where it says something else."""
    if f"os error {errno.ENOSPC}" not in str(error):
        return None
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` (file or directory) and rename it onto `path` if the
    block succeeds.

    A reader therefore sees the old content or the new one, never half of it. On failure the temporary is
    removed and `path` is as it was. A directory that exists already is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield holder / path.name
        if (holder / path.name).is_dir() and path.is_dir():
            os.replace(path, holder / "replaced")
        os.replace(holder / path.name, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def quieten_libraries() -> None:
    """Keep the loading bars, notices and upgrade advice of diffusers, transformers and Pillow off the console."""
    from diffusers.utils import logging as diffusers_logging
    from PIL import Image
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)
    # Such an image is refused by name.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
