"""The processes of a run: whether the machine is one for so many, and what is said when one of them is gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from stepdistill.errors import UserError, first_line

# What gloo and NCCL say when another process no longer answers.
_GONE = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "remote process",
    "Timed out waiting",
    "connection timed out",
)


def check_processes() -> None:
    """UserError where more processes were started than a machine without a GPU has CPUs: a launch file for GPUs."""
    count, cpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), os.cpu_count() or 1
    meant = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if count > cpus and not meant and not torch.accelerator.is_available():
        raise UserError(
            f"{count} processes were started, one for each GPU, and this machine has none, and {cpus} CPUs; launch with"
            " training/accelerate/2cpu.yaml or cpu.yaml, or set ACCELERATE_USE_CPU=true if so many are meant."
        )


@contextlib.contextmanager
def peers(processes: int) -> Iterator[None]:
    """A sentence for a block that ended because another process of the run did.

    Raises:
        UserError: with what the library says of it.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not any(word in str(error) for word in _GONE):
            raise
        raise UserError(
            "another process of this run has ended, and said why if it could; the same command goes on from the last"
            f" checkpoint ({first_line(error)})."
        ) from None
