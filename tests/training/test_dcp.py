"""Checkpoints of shards: safetensors by torch.distributed.checkpoint, which nothing unpickles."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import two_processes
from runs import same
from safetensors.torch import save_file
from torch import nn

from stepdistill.errors import UserError
from training import dcp, saved
from training.checkpoint import RunDirectory
from training.launch import together
from training.saved import Damaged


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(run: RunDirectory, step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As a run in shards does, whose only process holds all of everything."""
    model, optimizer = trained()
    average = {**model.state_dict(), "updates": torch.tensor(7)}
    networks = {"student": model.state_dict(), "student_ema": average}
    run.save_shards(step, networks, {"student": optimizer.state_dict()}, {"step": step})
    return model, optimizer


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_either_form_holds_the_same_and_the_one_of_shards_has_checksums(tmp_path):
    run = RunDirectory(tmp_path)
    model, optimizer = save(run, 1)
    names = {"student": model.state_dict()}
    run.save(2, {**names, "student_ema": {}}, {"student": optimizer.state_dict()}, {"step": 2})
    shards, whole = run.load(1), run.load(2)
    assert same(shards.tensors["student"], whole.tensors["student"])
    assert same(shards.optimizers, whole.optimizers) and same(
        whole.optimizers["student"], optimizer.state_dict()
    )
    assert int(shards.tensors["student_ema"]["updates"]) == 7
    again = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    shards.load_into("student", again)
    assert same(again.state_dict(), model.state_dict())
    with pytest.raises(UserError, match="one of another size or rank for 'student'"):
        shards.load_into("student", nn.Linear(4, 3))
    (shard,) = (tmp_path / "checkpoints" / "1" / "student").iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Damaged, match=r"student/shard-00001.* has another checksum"):
        saved.verify(tmp_path / "checkpoints" / "1")


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path):
    run = RunDirectory(tmp_path / "run")
    model, _ = save(run, 1)
    folder, trace = run.checkpoints / "1", tmp_path / "trace"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for place in (folder, folder / "student"):
        # What torch.distributed.checkpoint would read by default.
        for name in (".metadata", "__0_0.distcp", "student.metadata"):
            (place / name).write_bytes(pickle.dumps(Trap(trace)))
    found = run.load(1)
    assert same(found.tensors["student"], model.state_dict()) and found.optimizers and not trace.exists()
    (shard,), again = (folder / "student").glob("*.safetensors"), saved.read(folder)
    shard.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(Damaged, match="cannot be read"):
        again.weights("student")
    assert not trace.exists()
    with open(folder / ".metadata", "rb") as file:
        pickle.load(file)
    assert trace.exists()


def test_a_tensor_without_one_of_its_parts_is_no_tensor(tmp_path):
    for number, (offset, rows) in enumerate(((0, 2), (3, 1))):
        said = json.dumps({"w": {"saved_offsets": [offset, 0]}})
        file = tmp_path / f"shard-0000{number}.safetensors"
        save_file({"w": torch.ones(rows, 2)}, file, {"DCP_SHARDING_INFO": said})
    with pytest.raises(ValueError, match=r"the parts of w do not make \(4, 2\)"):
        dcp.layout(tmp_path)


def test_shards_on_another_machine_are_missed(tmp_path):
    (tmp_path / "1").mkdir()
    away = {"student/shard-00002-model-00001-of-00001.safetensors": (8, "0" * 64)}
    with pytest.raises(UserError, match=r"shard-00002.*all machines share"):
        saved.finish(tmp_path / "1", 1, ["student"], {}, {}, away)


def _fails_in_one(rank: int) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    assert together(lambda: rank) == [0, 1]

    def full() -> None:
        if rank:
            raise OSError(errno.ENOSPC, "no room", "shard")

    with pytest.raises(OSError) as error:
        together(full)
    assert error.value.errno == errno.ENOSPC and error.value.filename == "shard"

    def refuses() -> None:
        if rank:
            raise UserError("not finite.")

    with pytest.raises((UserError, SystemExit)) as end:
        together(refuses)
    # The main process says what the other one refuses.
    assert str(end.value) == ("2" if rank else "not finite.")


def test_what_fails_in_one_process_ends_in_all():
    two_processes(_fails_in_one)
