"""What makes a phase's fresh batch: the order of examples, their conditions, real x0 and trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.denoiser import Cond, map_cond
from stepdistill.families.base import Family
from stepdistill.methods.base import Batch
from training.data import Source, Unreadable, order
from training.data.buckets import Bucket, next_bucket, shared_out
from training.encoded import Latents
from training.notices import warn
from training.state import TrainState
from training.trajectories import Trajectories

if TYPE_CHECKING:
    from accelerate import Accelerator


# Examples that may vanish during a run, unless a hundredth of all are more.
LOST = 10


class Batches:
    """One process's share of every global batch.

    Args:
        split: (examples of one process in one pass, passes), see `OptimConfig.split`.
        needs_images: whether batches carry real x0.
        latents: x0 of all examples if it was computed before; else each batch makes its own.
        pairs: the teacher's trajectories, for methods that want them.

    Attributes:
        lost: examples that could be read when the source was opened and no longer can, with the reason.
        data: what tells these data from others, for checkpoints.
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
        self.buckets = source.buckets
        self.shapes = [
            family.shape_at(each.size) if source.bucketed else family.shape for each in self.buckets
        ]
        self.lost: dict[int, str] = {}
        self.data = {"fingerprint": source.fingerprint(), "said": source.describe()}

    def draw(self, phase: str, state: TrainState) -> Iterator[Batch]:
        """This process's passes of the next global batch, which is of one bucket and counted in `state`."""
        size = self.micro * self.processes * self.passes
        counts = [len(bucket.members) for bucket in self.buckets]
        if len(state.drawn) != len(counts):
            state.drawn = shared_out(state.samples, counts)
        number = next_bucket(state.seed, counts, state.drawn, size)
        first = state.drawn[number]
        rows = self.source.order(state.seed, counts[number], first, size)
        uses = [(first + i) // counts[number] for i in range(size)]
        pairs = order(state.seed, self.pairs.size, state.samples, size) if self.pairs else None
        state.samples += size
        state.drawn[number] += size
        for each in range(self.passes):
            start = (each * self.processes + self.process) * self.micro
            positions = range(start, start + self.micro)
            examples = [int(self.buckets[number].members[rows[i]]) for i in positions]
            batch = self._batch(examples, [uses[i] for i in positions], positions, phase, state, number)
            if pairs is not None:
                batch.pairs = self.pairs.rows([pairs[i] for i in positions], self.device)
            yield batch

    def _batch(
        self,
        examples: list[int],
        uses: list[int],
        positions: range,
        phase: str,
        state: TrainState,
        number: int,
    ) -> Batch:
        family, bucket = self.family, self.buckets[number]
        noise = state.noise(positions, phase, self.device)
        if family.needs_images:
            examples, images = self._readable(examples, bucket, self.source.images)
        examples, x0 = self._real(examples, bucket) if self.needs_images else (examples, None)
        if x0 is not None and getattr(self.source.config, "flip", False):
            x0 = mirrored(x0, noise.rand() < 0.5)
        prompts = family.prompts(self.source, examples, uses)
        cond, uncond = self._moved(family.encode(prompts)), self._moved(family.uncond(len(examples)))
        if family.needs_images:
            cond, uncond = family.completed(cond, uncond, torch.from_numpy(images).movedim(-1, -3), noise)
        if self.source.has_images:
            sizes = self._sizes(examples, bucket)
            cond, uncond = family.sized(cond, sizes), family.sized(uncond, sizes)
        shape = self.shapes[number]
        return Batch(cond, uncond, shape, noise.index, noise, x0, prompts=prompts, examples=examples)

    def _sizes(self, examples: list[int], bucket: Bucket) -> Tensor:
        """As `Source.sizes` where the images are in the batch; else what a pipeline tells by default."""
        if self.needs_images:
            sizes = self.source.sizes(examples)
        else:
            sizes = np.tile([*bucket.size, 0, 0, *bucket.size], (len(examples), 1))
        return torch.as_tensor(sizes, dtype=torch.float32, device=self.device)

    def _real(self, examples: list[int], bucket: Bucket) -> tuple[list[int], Tensor]:
        """The examples, as `_readable` has them, and their x0."""
        if self.latents is not None:
            return examples, self.latents.of(examples).to(self.device)
        examples, x0 = self._readable(examples, bucket, lambda each: self.family.examples(self.source, each))
        return examples, x0.to(self.device)

    def _readable(
        self, examples: list[int], bucket: Bucket, read: Callable[[list[int]], Any]
    ) -> tuple[list[int], Any]:
        """The examples, each of which that can no longer be read with the next of its bucket in its place, and what
        `read` gives for them.
        """
        while True:
            examples = [self._kept(example, bucket) for example in examples]
            try:
                return examples, read(examples)
            except Unreadable as error:
                self.lost[error.index] = str(error)
                if all(int(member) in self.lost for member in bucket.members):
                    raise
                warn("W04", f"example {error.index} is left out from now on: {error}")

    def _kept(self, example: int, bucket: Bucket) -> int:
        while example in self.lost:
            (row,) = bucket.rows([example])
            example = int(bucket.members[(row + 1) % len(bucket.members)])
        return example

    @property
    def trouble(self) -> str:
        """Why no run should go on with these data, one sentence; "" = it should."""
        most = max(LOST, self.source.size // 100)
        if len(self.lost) <= most:
            return ""
        last = list(self.lost.values())[-1]
        return f"{len(self.lost):,} of {self.source.size:,} examples can no longer be read, the last because {last}"

    def _moved(self, cond: Cond) -> Cond:
        return map_cond(lambda c: c.to(self.device), cond)


def mirrored(x0: Tensor, which: Tensor) -> Tensor:
    """Images (B, ..., width), those of `which` (B,) bool from right to left."""
    return torch.where(which.reshape(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
