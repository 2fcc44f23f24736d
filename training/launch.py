"""The processes of a run: whether the machine is one for so many, and what is said when one of them is gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from stepdistill.errors import UserError, first_line

Found = TypeVar("Found")

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


def is_main() -> bool:
    """Whether this is the process that speaks, and writes what is written once."""
    return PartialState().is_main_process


def by_main(does: Callable[[], Any]) -> Any:
    """What the main process alone finds. What it refuses ends all, and it alone says why."""
    found: list[Any] = [None, None]
    if is_main():
        try:
            found = [does(), None]
        except UserError as error:
            found = [None, str(error)]
    answer, refused = broadcast_object_list(found)
    _end(refused)
    return answer


def together(does: Callable[[], Found]) -> list[Found]:
    """What each process finds, in their order, in all of them.

    Raises:
        UserError: one has refused; the main process says so.
        OSError: one could not write; in all of them, so that all try again or none.
    """
    found: Any = None
    refused, failed = "", None
    try:
        found = does()
    except UserError as error:
        refused = str(error)
    except OSError as error:
        failed = error
    told = gather_object([(found, refused, failed)])
    _end(next((words for _, words, _ in told if words), ""))
    for _, _, error in told:
        if error is not None:
            raise error
    return [each for each, _, _ in told]


def _end(refused: str) -> None:
    if refused and is_main():
        raise UserError(refused)
    if refused:
        raise SystemExit(2)


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
