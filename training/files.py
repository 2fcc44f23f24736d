"""Tensors onto the disk, so that what has its name has its content."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import full_disk

SUFFIX = ".safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to the disk; tensors may share memory, and lie anywhere.

    Raises:
        OSError: the disk is full.
    """
    ready, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(ready, str(path), metadata)
    except SafetensorError as error:
        raise (full_disk(error, path) or error) from None
    flush(path)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log in JSON, none without one; the last one of a run that was killed may be half a line."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def flush(path: Path) -> None:
    """Onto the disk before the rename: after a power cut, a file that has its name has its content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove(*paths: Path) -> None:
    """Files and directories, whether they are there or not; of a link, the link."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
