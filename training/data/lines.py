"""Prompts in such numbers that no process can hold them: text files that stay on the disk."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepdistill.errors import UserError
from training.data.base import Source, digest, facts
from training.data.reading import files_of

# Lines between two whose places are remembered: 8 bytes for so many.
EVERY = 64
# Bytes looked through at once.
CHUNK = 1 << 26


class Lines(Source):
    """One prompt a line in .txt files, of which none is held in memory: a file of 10^9 prompts takes 125 MB of each process.

    Files are looked through once when they are opened. A blank line is the empty prompt.
    """

    has_images = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """path: a .txt file, or a folder of them, read by name."""

        path: Path

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.files = files_of(config.path, ".txt")
        self.captions = Texts(self.files)
        self.size = len(self.captions)
        if not self.size:
            raise UserError(f"data.path={config.path} holds no prompts.")
        self.counts = {"kept": self.size}

    def fingerprint(self) -> str:
        """Of every file's name, size and both ends: all of it would take as long as an epoch."""
        parts: list[str | bytes] = [facts(self.config)]
        for file in self.files:
            with open(file, "rb") as opened:
                parts += [file.name, str(file.stat().st_size), opened.read(1 << 20)]
                opened.seek(max(0, file.stat().st_size - (1 << 20)))
                parts.append(opened.read())
        return digest(parts)


class Texts(Sequence):
    """Lines of text files one after another, by number."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps: list[mmap.mmap] = []
        # Of each file, where every EVERY-th line begins.
        self._anchors: list[np.ndarray] = []
        # Lines up to and with each file.
        self._ends: list[int] = []
        for file in files:
            if file.stat().st_size == 0:
                continue
            with open(file, "rb") as opened:
                self._maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            anchors, count = _places(self._maps[-1])
            self._anchors.append(anchors)
            self._ends.append(len(self) + count)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        file = bisect.bisect_right(self._ends, number)
        within = number - (self._ends[file - 1] if file else 0)
        text, at = self._maps[file], int(self._anchors[file][within // EVERY])
        for _ in range(within % EVERY):
            at = text.find(b"\n", at) + 1
        end = text.find(b"\n", at)
        return text[at : end if end >= 0 else len(text)].decode("utf-8", errors="replace").strip()


def _places(text: mmap.mmap) -> tuple[np.ndarray, int]:
    """Where every EVERY-th line begins, and how many lines there are."""
    kept, count = [np.zeros(1, np.int64)], 0
    for start in range(0, len(text), CHUNK):
        begins = np.flatnonzero(np.frombuffer(text[start : start + CHUNK], np.uint8) == 10) + start + 1
        # The line that begins behind the n-th end of a line is number n.
        kept.append(begins[(-count - 1) % EVERY :: EVERY])
        count += len(begins)
    return np.concatenate(kept), count + (text[len(text) - 1] != 10)
