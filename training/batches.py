"""What makes a phase's fresh batch: the order of examples, their conditions, real x0 and trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, map_cond
from stepdistill.families.base import Family
from stepdistill.methods.base import Batch
from training.data import Source, order
from training.encoded import Latents
from training.state import TrainState
from training.trajectories import Trajectories

if TYPE_CHECKING:
    from accelerate import Accelerator


class Batches:
    """One process's share of every global batch.

    Args:
        split: (examples of one process in one pass, passes), see `OptimConfig.split`.
        needs_images: whether batches carry real x0.
        latents: x0 of all examples if it was computed before; else each batch makes its own.
        pairs: the teacher's trajectories, for methods that want them.
    """

    def __init__(
        self,
        family: Family,
        source: Source,
        accelerator: Accelerator,
        split: tuple[int, int],
        *,
        needs_images: bool,
        latents: Latents | None = None,
        pairs: Trajectories | None = None,
    ) -> None:
        self.family, self.source, self.needs_images = family, source, needs_images
        self.micro, self.passes = split
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.device: torch.device = accelerator.device
        self.latents, self.pairs = latents, pairs

    def draw(self, phase: str, state: TrainState) -> Iterator[Batch]:
        """This process's passes of the next global batch, which is counted in `state`."""
        size = self.micro * self.processes * self.passes
        examples = order(state.seed, self.source.size, state.samples, size)
        pairs = order(state.seed, self.pairs.size, state.samples, size) if self.pairs else None
        state.samples += size
        for number in range(self.passes):
            first = (number * self.processes + self.process) * self.micro
            positions = range(first, first + self.micro)
            batch = self._batch([examples[i] for i in positions], positions, phase, state)
            if pairs is not None:
                batch.pairs = self.pairs.rows([pairs[i] for i in positions], self.device)
            yield batch

    def _batch(self, examples: list[int], positions: range, phase: str, state: TrainState) -> Batch:
        family = self.family
        noise = state.noise(positions, phase, self.device)
        prompts = family.prompts(self.source, examples)
        cond, uncond = self._moved(family.encode(prompts)), self._moved(family.uncond(len(examples)))
        x0 = self._real(examples) if self.needs_images else None
        return Batch(cond, uncond, family.shape, noise.index, noise, x0, prompts=prompts)

    def _real(self, examples: list[int]) -> Tensor:
        if self.latents is not None:
            return self.latents.of(examples).to(self.device)
        return self.family.examples(self.source, examples).to(self.device)

    def _moved(self, cond: Cond) -> Cond:
        return map_cond(lambda c: c.to(self.device), cond)
