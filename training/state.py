"""Where a stage of a run stands: what a checkpoint holds beside weights and optimisers."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepdistill.noise import SampleNoise


@dataclass
class TrainState:
    """Counters of one stage, and the randomness that follows from them.

    No generator is ever saved: what is random is drawn from (seed, step, phase, sample index), so a run that was
    interrupted and goes on equals one that was not.

    Attributes:
        seed: the run's.
        stage: its number, from 0; offset: the global step it starts at.
        step: loop iterations done in this stage.
        samples: examples drawn by all phases, from which data order follows.
        updates: optimiser steps taken, by network.
        drawn: of `samples`, how many were of each bucket of the data; [] at the start.
        skipped: updates left out, because a loss or a gradient was not finite.
    """

    seed: int
    stage: int = 0
    offset: int = 0
    step: int = 0
    samples: int = 0
    updates: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    drawn: list[int] = field(default_factory=list)
    skipped: int = 0

    @property
    def global_step(self) -> int:
        """Loop iterations done over all stages."""
        return self.offset + self.step

    def noise(self, positions: Sequence[int], phase: str, device: torch.device) -> SampleNoise:
        """What `phase` draws in this iteration for the samples at `positions` in the global batch."""
        return SampleNoise(positions, self.seed, self.global_step, phase, device)

    def seed_networks(self, phase: str, process: int) -> None:
        """Seed what a network draws by itself, dropout, in this iteration's `phase` on this process."""
        place = (self.seed, self.global_step, phase, process)
        torch.manual_seed(zlib.crc32(repr(place).encode()))

    def state_dict(self) -> dict[str, Any]:
        """The counters, as plain values."""
        plain = {"samples": self.samples, "drawn": list(self.drawn), "skipped": self.skipped}
        return plain | {"updates": dict(self.updates)}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Go on after `global_step` with the counters that `state_dict` gave there."""
        self.step = global_step - self.offset
        self.samples = state["samples"]
        self.updates.update(state["updates"])
        self.drawn = list(state.get("drawn", []))
        self.skipped = state.get("skipped", 0)
