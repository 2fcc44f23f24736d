"""What makes a phase's fresh batch: the order of examples, their conditions, real x0 and trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, map_cond
from stepdistill.families.base import Family
from stepdistill.methods.base import Batch, Method
from training.data import Source, order
from training.precompute import Trajectories, latents, trajectories
from training.recipe import Recipe
from training.state import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

CACHE = Path("cache")


def prepare(
    recipe: Recipe, method: Method, family: Family, source: Source, accelerator: Accelerator
) -> Batches:
    """The batches of one stage, after what is computed once per data set and teacher: latents, trajectories.

    Both lie in ./cache and are read from there the next time. All processes call it, the main one computes.

    Raises:
        UserError: a latent or a trajectory is not finite, or the batch cannot be split over the processes.
    """
    split, main = recipe.optim.split(accelerator.num_processes), accelerator.is_main_process
    x0 = pairs = None
    if method.needs_images and family.latent:

        def encode(images: Tensor) -> Tensor:
            return family.encode_images(images.to(accelerator.device))

        with accelerator.main_process_first():
            x0 = latents(source, encode, CACHE, family.latent_key(), progress=main)
    if (settings := method.pairs(family.schedule)) is not None:
        with accelerator.main_process_first():
            pairs = trajectories(family, source, settings, CACHE, accelerator.device, split[0], progress=main)
    return Batches(family, source, accelerator, split, needs_images=method.needs_images, x0=x0, pairs=pairs)


class Batches:
    """One process's share of every global batch.

    Args:
        split: (examples of one process in one pass, passes), see `OptimConfig.split`.
        needs_images: whether batches carry real x0.
        x0: (source.size, *shape), x0 of all examples if it was computed before; else each batch makes its own.
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
        x0: Tensor | None = None,
        pairs: Trajectories | None = None,
    ) -> None:
        self.family, self.source, self.needs_images = family, source, needs_images
        self.micro, self.passes = split
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.device: torch.device = accelerator.device
        self.x0, self.pairs = x0, pairs

    def draw(self, phase: str, state: TrainState) -> Iterator[Batch]:
        """This process's passes of the next global batch, which is counted in `state`."""
        size = self.micro * self.processes * self.passes
        examples = order(state.seed, self.source.size, state.batches, size)
        pairs = order(state.seed, self.pairs.size, state.batches, size) if self.pairs else None
        state.batches += 1
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
        if self.x0 is not None:
            return self.x0[examples].float().to(self.device)
        return self.family.examples(self.source, examples).to(self.device)

    def _moved(self, cond: Cond) -> Cond:
        return map_cond(lambda c: c.to(self.device), cond)
