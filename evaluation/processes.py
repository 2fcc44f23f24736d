"""Several processes at one measurement, as `accelerate launch` or `torchrun` starts them.

Every process runs the same program and ends with the same numbers. What is dear is dealt out: whole shards of
samples, and the rows of every chunk of features. What is written is written by the first process alone. Only
features and small objects travel, over gloo, so that this works without a GPU and beside any. The transport is
accelerate's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from stepdistill.errors import UserError

if TYPE_CHECKING:
    from evaluation.extractors import Extractor

T = TypeVar("T")
# Ends the name of a network that runs in bfloat16.
BFLOAT16 = "-bf16"
# The slowest process may be hours behind.
_PATIENCE = timedelta(days=2)


class Processes:
    """This process among `count`; by default alone, when everything below costs nothing."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def join(cls) -> Processes:
        """The processes a launcher started (it sets WORLD_SIZE), or this one alone. Raises UserError if the launcher's
        settings are incomplete.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from accelerate import PartialState

        try:
            state = PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
        except (ValueError, RuntimeError) as error:
            PartialState._reset_state()
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot find each other "
                f"({str(error).splitlines()[0]}); start them with accelerate launch."
            ) from None
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name`, or for "cuda" the GPU of this process on its machine."""
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and self.count > 1 else name

    def mine(self, index: int) -> bool:
        """Whether piece `index` of dealt-out work is this process's."""
        return index % self.count == self.rank

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def from_first(self, make: Callable[[], T]) -> T:
        """make() of the first process, for all. A UserError there is one everywhere."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        made: list[Any] = [None]
        if self.first:
            try:
                made = [make()]
            except UserError as error:
                made = [error]
        broadcast_object_list(made)
        if isinstance(made[0], UserError):
            raise made[0]
        return made[0]

    def share(self, extractor: Extractor) -> Extractor:
        """An extractor of the same features, bit for bit, of whose chunks each process does one in turn.

        Its chunk is as many of the old one's as there are processes, and each process runs its own part at
        the old size; so every row sees the neighbours it would see in a single process.
        """
        if self.count == 1:
            return extractor
        from accelerate.utils import gather

        size, inner = extractor.chunk, extractor.network

        def network(images: Tensor) -> Tensor:
            return gather(inner(images[self.rank * size : (self.rank + 1) * size]).float().cpu())

        return replace(extractor, chunk=size * self.count, network=network)


def ready_device(name: str) -> str:
    """`name`, a device that is here, on which float32 is float32: TF32, which only some GPUs have, is off. Raises
    UserError if there is no such device.
    """
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UserError(f"--device {name} is not here; use {' or '.join(there)}.") from None
    if torch.device(name).type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    return name


@contextlib.contextmanager
def precision_kept() -> Iterator[None]:
    """Afterwards TF32 is as it was: a training run that is measured goes on with the bits of one that is not."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def in_bfloat16(
    network: Callable[..., Tensor], device: str, name: str, doubts: list[str]
) -> Callable[..., Tensor]:
    """`network` with its products in bfloat16 (autocast; weights stay float32), giving float32.

    doubts: gets what that changed in the first batch, which runs in float32 too.
    """

    compared = False

    def run(*inputs: Tensor) -> Tensor:
        nonlocal compared
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            rows = network(*inputs).float()
        if not compared:
            compared = True
            exact = network(*inputs).float()
            share = float((rows - exact).norm() / exact.norm())
            doubts.append(
                f"{name} ran in bfloat16, which changed what it gave for its first batch by {share:.2%}."
            )
        return rows

    return run
