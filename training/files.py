"""Tensors onto the disk, so that what has its name has its content."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
    flush(path)


def flush(path: Path) -> None:
    """Onto the disk before the rename: after a power cut, a file that has its name has its content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
