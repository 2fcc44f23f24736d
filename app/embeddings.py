"""Embeddings of prompts and latents of pictures, kept: the same one is typed, seeded and stepped through many times."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Cond = Tensor | dict[str, Tensor] | None
# Bytes of all embeddings of one model, on its device.
MAX_BYTES = 64 * 2**20
MAX_COUNT = 512


class Embeddings:
    """`encode` of a family with a memory, called with prompts, or pictures, as `encode` is.

    Each prompt is encoded alone, so that its embedding does not depend on its neighbours. Where those of several
    prompts have different shapes, they are encoded together, as the family pads them.

    key: what a prompt is remembered by.
    """

    def __init__(
        self, encode: Callable[[Sequence[Any]], Cond], key: Callable[[Any], Any] = lambda prompt: prompt
    ) -> None:
        self._encode, self._key = encode, key
        self._kept: OrderedDict[Any, Cond] = OrderedDict()
        self._bytes = 0
        self.hits = self.misses = 0

    @torch.inference_mode(False)
    def __call__(self, prompts: Sequence[Any]) -> Cond:
        alone = [self._one(prompt) for prompt in prompts]
        first = alone[0]
        if isinstance(first, Tensor):
            if all(c.shape == first.shape for c in alone):
                return torch.cat(alone)
        elif isinstance(first, dict):
            if all(c[name].shape == first[name].shape for c in alone for name in first):
                return {name: torch.cat([c[name] for c in alone]) for name in first}
        elif first is None:
            return None
        return self._encode(prompts)

    def _one(self, prompt: Any) -> Cond:
        key = self._key(prompt)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        with torch.no_grad():
            cond = self._encode([prompt])
        self._kept[key] = cond
        self._bytes += _size(cond)
        while len(self._kept) > MAX_COUNT or (self._bytes > MAX_BYTES and len(self._kept) > 1):
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return cond


def _size(cond: Cond) -> int:
    parts = cond.values() if isinstance(cond, dict) else [cond] if isinstance(cond, Tensor) else []
    return sum(part.nbytes for part in parts)
