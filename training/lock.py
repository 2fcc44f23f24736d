"""One run at a time in a directory: a lock that its process holds, and that the system takes back when it is gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from stepdistill.errors import UserError

# Seconds between two tries of one who waits.
PATIENCE = 0.5
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class Lock:
    """The file `path`, locked by `take`. A crash releases it, and so does `release` or the end of this object.

    Where a file system knows no locks, as some network ones do, it is taken by everybody.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def take(self) -> bool:
        """False where another process has it. Raises OSError where the file cannot be written."""
        if self._file is not None:
            return True
        file = open(self.path, "a+b")  # noqa: SIM115 - open as long as it is locked
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.close()
                return False
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        # Only words for another's message: a full disk must not stop a run here.
        with contextlib.suppress(OSError):
            file.flush()
        self._file = file
        return True

    def wait(self, say: Callable[[], None]) -> None:
        """`take`, however long it takes; `say` is called once where that is long."""
        said = False
        while not self.take():
            if not said:
                say()
            said = True
            time.sleep(PATIENCE)

    def held(self) -> str:
        """The process that has it, "" where none does; nothing is written."""
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return self._owner() if error.errno in _HELD else ""
        return ""

    def _owner(self) -> str:
        with contextlib.suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
        return "unknown"

    def release(self) -> None:
        """Anybody may take it now."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def refused(self) -> UserError:
        """For the person whose command found it taken."""
        return UserError(
            f"another run is at work in {self.path.parent} (process {self._owner()}); wait until it ends, stop it, or choose"
            " another directory with run.out=..."
        )
