"""Images in NumPy files: the array of an .npy, `arr_0` of an .npz."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from evaluation.facts import Facts
from evaluation.images import Images
from stepdistill.errors import UserError
from stepdistill.provenance import sha256_of_files
from stepdistill.untrusted import IMAGE_PIXELS, readable

# Images read at a time.
_PART = 16


class ArrayImages(Images):
    """The array of an .npy file, or `arr_0` of an .npz file: uint8 (N, H, W, 3), read in parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as file:
            self.shape, dtype, fortran = _array_header(file, path)
        pixels = math.prod(self.shape[1:3])
        known = len(self.shape) == 4 and self.shape[3] == 3 and min(self.shape) > 0 and pixels <= IMAGE_PIXELS
        if not known or dtype != np.uint8 or fortran:
            raise UserError(
                f"{path} holds {dtype} {self.shape}; images are uint8 (N, H, W, 3), grey levels 0 to 255."
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        count, *shape = self.shape
        size = int(np.prod(shape))
        with self._opened() as file:
            _array_header(file, self.path)
            for start in range(0, count, _PART):
                rows = min(_PART, count - start)
                with readable(self.path, "an array"):
                    content = file.read(rows * size)
                if len(content) != rows * size:
                    raise UserError(f"{self.path} is cut short after {start} images; copy it again.")
                pixels = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(rows, *shape).copy())
                yield pixels.permute(0, 3, 1, 2).contiguous()

    names: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Of the file."""
        return sha256_of_files([self.path], self.path.parent)

    def check_headers(self) -> None:
        """There are none."""

    def peek(self) -> Facts:
        """Facts of an array: its size."""
        return Facts(1, (self.shape[2], self.shape[1]))

    def _opened(self) -> IO[bytes]:
        try:
            return (
                zipfile.ZipFile(self.path).open("arr_0.npy")
                if self.path.suffix == ".npz"
                else open(self.path, "rb")
            )
        # A damaged archive makes zipfile raise nearly anything.
        except Exception as error:
            raise UserError(f"{self.path} holds no array arr_0 of images ({type(error).__name__}).") from None


def _array_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype, bool]:
    form = np.lib.format
    try:
        read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}[form.read_magic(file)]
        shape, fortran, dtype = read(file)
    # The header is Python, and damaged Python ends in its tokeniser.
    except Exception:
        raise UserError(
            f"{path} is no NumPy array that can be read; save it again with numpy.save."
        ) from None
    return shape, dtype, fortran
