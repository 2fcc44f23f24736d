"""Indices only, for the toy family, which draws its own points."""

from __future__ import annotations

from dataclasses import dataclass

from training.data.base import Partition, Source, at_least, counts, digest, facts


class Toy(Source):
    """The toy family's own sampler stands in for data: indices only."""

    has_images = False

    @dataclass(frozen=True)
    class Config(Partition):
        """size: how many points the family is asked for, of all parts."""

        size: int = 100_000

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(1, size=self.size)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.size = len(config.block(config.size))
        self.counts = counts(self.size, {"in other partitions": config.size - self.size})

    def fingerprint(self) -> str:
        return digest([facts(self.config)])
