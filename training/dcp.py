"""Tensors of a checkpoint by torch.distributed.checkpoint: each process writes the shards it holds, and reads the parts it wants,
whatever the number of processes was that wrote them.

They lie in safetensors. Its files by default are pickles, which is what nothing here reads.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from training.files import SUFFIX

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

# Names are given one by one, with tensors for values.
_FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
_ALL = "all"


def write(place: Path, state: Mapping[str, Tensor]) -> list[Path]:
    """`state` into the directory `place`: the files that this process has written. All processes of a run call it.

    What every process holds whole is written by one of them.

    Raises:
        OSError: in all processes, where one could not write.
    """
    from torch.distributed import checkpoint as dcp

    class Planner(dcp.DefaultSavePlanner):
        def set_up_planner(self, state_dict: Any, *given: Any, **named: Any) -> None:
            super().set_up_planner(state_dict[_ALL], *given, **named)

    alone = not distributed.is_initialized()
    writer = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)
    with _plain():
        # Under one name: of every name it is given, `save` makes lines for a log.
        dcp.save({_ALL: dict(state)}, storage_writer=writer, planner=Planner(**_FLAT), no_dist=alone)
    number = 1 if alone else distributed.get_rank() + 1
    return sorted(place.glob(f"shard-{number:05d}-*{SUFFIX}"))


def layout(place: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in `place`, which `write` made, or in one safetensors file.

    Raises:
        ValueError: parts of a tensor are missing.
    """
    found = {}
    for name, said in _reader(place).read_metadata().state_dict_metadata.items():
        if sum(math.prod(part.sizes) for part in said.chunks) != math.prod(said.size):
            raise ValueError(f"the parts of {name} do not make {tuple(said.size)}")
        found[name] = (said.size, said.properties.dtype)
    return found


def read(place: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors `into`, shards or whole, on whatever device, with those of their names in `place`.

    Each process reads for itself, one tensor at a time and of it the part that it holds.

    Raises:
        ValueError, RuntimeError: one is missing, or of another shape.
    """
    from torch.distributed import checkpoint as dcp

    planner = dcp.DefaultLoadPlanner(**_FLAT)
    with _plain():
        dcp.load(dict(into), storage_reader=_reader(place), planner=planner, no_dist=True)


def _reader(place: Path) -> HuggingFaceStorageReader:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Files(FileSystem):
        def ls(self, path: Any) -> list[str]:
            return [str(path)] if place.is_file() else super().ls(path)

    reader = HuggingFaceStorageReader(str(place))
    reader.fs = Files()
    return reader


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Errors as they were raised, and no warning of what is meant."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
