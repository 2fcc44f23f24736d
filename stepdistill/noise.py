"""Random numbers that belong to a sample, not to a process or a batch.

A counter-based generator (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
turns (seed, step, phase, sample index, draw, element) into a number directly. So a resumed run draws what an
uninterrupted one would have drawn with no state to save, and a sample's noise is the same on whichever
process and device it lands. One torch.Generator per sample gives the same promise, but costs a Python loop
over the batch in every draw.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four int64 tensors holding 32-bit words -> four of the same shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64; the mask after the arithmetic shift leaves the true high word.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class SampleNoise:
    """The generator of one batch: every draw returns one row per sample, a pure function of that
    sample's index.

    Args:
        index: the samples' positions in the global batch (B,), each below 2^32.
        seed, step, phase: what else the numbers depend on.
        device: where draws are made.
    """

    def __init__(
        self,
        index: Tensor | Sequence[int],
        seed: int = 0,
        step: int = 0,
        phase: str = "",
        device: torch.device | str = "cpu",
    ):
        self.index = torch.as_tensor(index, dtype=torch.int64, device=device).flatten()
        self.seed, self.step, self.phase = seed, step, phase
        self._key = (zlib.crc32(f"{seed}/{phase}".encode()), step & _MASK)
        self._draws = 0

    def _words(self, count: int) -> Tensor:
        """(B, count) uniform 32-bit words; each call is a new, independent draw."""
        self._draws += 1
        blocks = torch.arange(-(-count // 4), dtype=torch.int64, device=self.index.device)
        element, index = torch.broadcast_tensors(blocks[None], self.index[:, None])
        words = philox(
            (element, torch.full_like(element, self._draws), index, torch.zeros_like(element)), self._key
        )
        return torch.stack(words, -1).flatten(1)[:, :count]

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape) uniform on (0, 1), float64."""
        return ((self._words(math.prod(shape)).to(torch.float64) + 0.5) / 2**32).reshape(-1, *shape)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal (Box-Muller)."""
        count = math.prod(shape)
        half = -(-count // 2)
        uniform = (self._words(2 * half).to(torch.float64) + 0.5) / 2**32
        radius, angle = (-2 * uniform[:, :half].log()).sqrt(), 2 * math.pi * uniform[:, half:]
        normal = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :count]
        return normal.reshape(-1, *shape).to(dtype)

    def randint(self, low: int, high: int) -> Tensor:
        """(B,) whole numbers in [low, high), int64."""
        return low + (self._words(1)[:, 0] * (high - low) >> 32)

    def shared_randint(self, low: int, high: int) -> int:
        """One whole number in [low, high) for the whole global batch, whatever part of it this process holds."""
        self._draws += 1
        counter = tuple(torch.tensor([word]) for word in (0, self._draws, _MASK, 1))
        return low + (int(philox(counter, self._key)[0]) * (high - low) >> 32)
