"""Files that browsers send: each is kept for the browser that sent it, and all of them in a bounded space."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
from collections import OrderedDict
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from app.connections import Receive, Scope
from app.guard import TooLarge
from app.png import MAX_FILE
from app.request import Invalid

# Bytes of all uploads together; the oldest go first. A file is read once, right after it came.
MAX_BYTES = 256 * 2**20
MAX_COUNT = 4096


class Uploads:
    """The files under `folder`, by path, and the browser that each belongs to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: OrderedDict[str, tuple[str, int]] = OrderedDict()

    async def store(self, scope: Scope, receive: Receive, browser: str) -> str:
        """Keep the one file in a form's field "files". Returns its path, which nobody could guess.

        Raises:
            Invalid: the body is no such form. TooLarge: the file has more than `MAX_FILE` bytes.
        """
        problem = Invalid("files", "an upload is a form with one file in its field 'files'.")
        if "boundary=" not in Request(scope).headers.get("content-type", ""):
            raise problem
        try:
            async with Request(scope, receive).form(max_files=1, max_fields=4, max_part_size=1024) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    raise problem
                name, data = file.filename or "", await file.read(MAX_FILE + 1)
        except (HTTPException, MultiPartException, UnicodeDecodeError, LookupError):
            raise problem from None
        if len(data) > MAX_FILE:
            raise TooLarge
        path = self.folder / secrets.token_hex(32) / _plain(name)
        await asyncio.to_thread(_write, path, data)
        self._kept[str(path)] = (browser, len(data))
        await asyncio.to_thread(self._prune)
        return str(path)

    def belongs(self, path: str, browser: str | None) -> bool:
        """Whether this browser has uploaded the file at `path`."""
        return browser is not None and self._kept.get(path, ("", 0))[0] == browser

    def _prune(self) -> None:
        while len(self._kept) > MAX_COUNT or sum(size for _, size in self._kept.values()) > MAX_BYTES:
            path, _ = self._kept.popitem(last=False)
            shutil.rmtree(Path(path).parent, ignore_errors=True)


def _plain(name: str) -> str:
    """A file's name without directories, dots in front, and whatever a shell or a browser might read in it."""
    kept = re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(name.replace("\\", "/")))[-80:].lstrip(".-")
    return kept or "file"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
