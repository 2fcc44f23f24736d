"""Procedural captioned scenes, the embedded teacher's world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepdistill import scenes
from training.data.base import Partition, Source, at_least, counts, digest, facts


class Scenes(Source):
    """Procedural captioned scenes, drawn when they are asked for."""

    @dataclass(frozen=True)
    class Config(Partition):
        """Which scenes.

        Attributes:
            size: how many there are, of all parts.
            seed: of the set; scene i is drawn from (seed, i).
            resolution: side of the images in pixels.
        """

        size: int = 20_000
        seed: int = 0
        resolution: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(1, size=self.size)
            at_least(8, resolution=self.resolution)
            if self.seed == scenes.HELD_OUT_SEED or self.seed < 0:
                raise ValueError(
                    f"seed must be 0 or more and not the evaluation's {scenes.HELD_OUT_SEED}, got {self.seed}."
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._block: Sequence[int] = range(config.size)
        if config.parts()[1] > 1:
            everything = _SceneCaptions(self._block, config.seed)[:]
            self._block, self.routing = config.of_captions(everything)
        self.size = len(self._block)
        self.captions = _SceneCaptions(self._block, config.seed)
        self.counts = counts(self.size, {"in other partitions": config.size - self.size})

    def images(self, indices: Sequence[int]) -> np.ndarray:
        out = np.empty((len(indices), *self.image_size, 3), np.uint8)
        for row, index in enumerate(indices):
            # As scenes.image_at, at any size.
            rng = np.random.default_rng((self.config.seed, self._block[index]))
            out[row] = scenes.render(scenes.sample_scene(rng), rng, self.config.resolution)
        return out

    def fingerprint(self) -> str:
        # The drawing itself is code and may change, so a few pictures speak for all.
        samples = self.images(range(min(8, self.size)))
        return digest([facts(self.config), samples.tobytes(), "\n".join(self.captions[:8])])


class _SceneCaptions(Sequence):
    """Captions of a block of scenes, made when they are read."""

    def __init__(self, block: Sequence[int], seed: int) -> None:
        self._block, self._seed = block, seed

    def __len__(self) -> int:
        return len(self._block)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [scenes.scene_at(i, self._seed).caption for i in self._block[index]]
        return scenes.scene_at(self._block[index], self._seed).caption
