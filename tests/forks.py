"""Processes forked from that of the tests, so that none imports torch and diffusers again."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def two_processes(does: Callable[..., None], *given: Any) -> None:
    """does(rank, *given) in two processes that find each other as those of `accelerate launch` do.

    Raises:
        ProcessRaisedException, ProcessExitedException (torch.multiprocessing): what the first of them ended with.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = torch.multiprocessing.start_processes(
        _process, (port, does, given), nprocs=2, join=False, start_method="fork"
    )
    # Where one ends early, the other has time for what it says of that.
    while not both.join(grace_period=30):
        pass


def _process(rank: int, port: int, does: Callable[..., None], given: tuple[Any, ...]) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    does(rank, *given)
