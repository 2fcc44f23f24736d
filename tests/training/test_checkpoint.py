from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import training.files as files
import training.saved as saved
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from training.checkpoint import RunDirectory
from training.recipe import Recipe, recipe_from

pytestmark = pytest.mark.usefixtures("own_code")


class Anything(Family, Method):
    @dataclass(frozen=True)
    class Config:
        scale: float = 1.0


def recipe(out: Path, **sections: Any) -> Recipe:
    named = {"name": f"{__name__}:Anything"}
    base = {"family": named, "method": named, "data": "toy", "run": {"steps": 10, "out": str(out)}}
    return recipe_from({**base, **sections})


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def save(run: RunDirectory, step: int, value: float = 0.0) -> None:
    weights = {"w": torch.full((3,), value)}
    run.save(step, {"student": weights, "student_ema": weights}, {}, {"step": step})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit(optimizer: type, dtype: torch.dtype, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)).to(dtype)
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}]
        return model, optimizer(groups, lr=0.1, betas=(0.5, 0.9))

    def train(model: nn.Module, optim: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
            optim.zero_grad()
            model(x).pow(2).mean().backward()
            optim.step()

    whole, whole_optim = fresh()
    train(whole, whole_optim, range(10))

    model, optim = fresh()
    train(model, optim, range(5))
    run = RunDirectory(tmp_path)
    run.save(5, {"student": model.state_dict()}, {"student": optim.state_dict()}, {"step": 5})
    loaded = run.load(5)
    assert same(loaded.optimizers["student"], optim.state_dict())
    model, optim = fresh()
    model.load_state_dict(loaded.tensors["student"])
    optim.load_state_dict(loaded.optimizers["student"])
    train(model, optim, range(5, 10))
    assert same(dict(model.state_dict()), dict(whole.state_dict()))
    assert same(optim.state_dict(), whole_optim.state_dict())


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    shared = torch.arange(6.0)
    tensors = {
        "student": {"a": shared, "tied": shared, "t": torch.arange(6.0).view(2, 3).T, "half": shared[3:]},
        "ladd/discriminator": {"x": torch.ones(2).bfloat16()},
    }
    extra = {"stage": 1, "updates": {"student": 7}, "first": {"loss": 0.1, "not finite": math.nan}}
    groups = [{"lr": 1e-5, "betas": (0.0, 0.9), "params": [0], "fused": None, "amsgrad": False}]
    optimizers = {"ladd/discriminator": {"state": {}, "param_groups": groups}}
    run.save(10, tensors, optimizers, extra)
    loaded = run.load(10)
    assert loaded.step == 10 and same(loaded.extra, extra) and same(loaded.optimizers, optimizers)
    assert same(
        loaded.tensors, {name: {k: t.contiguous() for k, t in s.items()} for name, s in tensors.items()}
    )
    assert {path.suffix for path in (run.checkpoints / "10").iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    """It marked what JSON has no word for, and kept the tensors of an optimiser under the names of today."""
    run = RunDirectory(tmp_path)
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}, 1: {"step": torch.tensor(2.0)}}
    groups = [{"lr": 0.1, "betas": (0.5, 0.9), "params": [0, 1]}]
    run.save(
        7,
        {"student": {"w": torch.ones(3)}},
        {"student": {"state": state, "param_groups": groups}},
        {"stage": 0},
    )
    now = run.load(7)
    folder = run.checkpoints / "7"
    items = [[i, {key: {"__tensor__": f"state.{i}.{key}"} for key in part}] for i, part in state.items()]
    tree = {
        "state": {"__items__": items},
        "param_groups": [{"lr": 0.1, "betas": {"__tuple__": [0.5, 0.9]}, "params": [0, 1]}],
    }
    (folder / "student.optimizer.json").write_text(json.dumps(tree))
    listed = json.loads((folder / "state.json").read_text())
    listed["files"]["student.optimizer.json"] = (folder / "student.optimizer.json").stat().st_size
    (folder / "state.json").write_text(json.dumps(listed | {"format": 1}))
    assert same(run.load(7).optimizers, now.optimizers) and same(run.load(7).extra, now.extra)


def test_incomplete_checkpoints_are_ignored(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, keep=9)
    assert run.latest() is None
    for step in (5, 10, 20, 30):
        save(run, step)
    (run.checkpoints / "30" / "student.safetensors").unlink()
    file = run.checkpoints / "20" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (run.checkpoints / "40").mkdir()
    (run.checkpoints / ".50.abc").mkdir()
    assert run.latest() == 10 and run.steps() == [5, 10]
    with pytest.raises(UserError, match=r"no complete checkpoint .*30; complete are the steps \[5, 10\]"):
        run.load(30)
    file = run.checkpoints / "10" / "student.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(
        UserError, match=r"checkpoint .*10 is damaged .* remove it to go on from the one before"
    ):
        run.load(10)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, keep=2)
    metrics = {10: 5.0, 20: 1.0, 30: math.nan, 40: 2.0, 50: 3.0}
    better = []
    for step, metric in metrics.items():
        save(run, step)
        better.append(run.record_best(step, metric))
    assert better == [True, True, False, False, False]
    assert run.steps() == [20, 40, 50] and run.best() == (20, 1.0)
    assert run.record_best(50, 9.0, lower_is_better=False)
    save(run, 60)
    assert run.steps() == [50, 60]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path, keep=1)
    save(run, 1, 1.0)
    real, calls = files.save_file, []

    def full(tensors: dict, path: str, metadata: None) -> None:
        calls.append(path)
        # The words of safetensors 0.8 on a full disk.
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError) as error:
        save(run, 2, 2.0)
    assert error.value.errno == errno.ENOSPC and error.value.filename == calls[1]
    assert [path.name for path in run.checkpoints.iterdir()] == ["1"]
    assert run.latest() == 1 and same(run.load(1).tensors["student"]["w"], torch.ones(3))


def test_a_killed_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    run, real = RunDirectory(tmp_path), saved.write_json
    save(run, 1, 1.0)

    def killed(path: Path, tree: Any) -> None:
        # Gone at once, as after a power cut: nothing is tidied up.
        real(path, tree) if path.name != "state.json" else os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            saved.write_json = killed
            save(run, 2, 0.0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert run.latest() == 1 and same(run.load(1).tensors["student"]["w"], torch.ones(3))
    # The left-over of the killed save.
    assert len(list(run.checkpoints.iterdir())) == 2
    run.begin(recipe(tmp_path))
    assert [path.name for path in run.checkpoints.iterdir()] == ["1"]


def test_begin_resumes_the_same_run_only(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = RunDirectory(out)
    assert run.begin(recipe(out)) == 0
    # Nothing was trained yet: free to change.
    assert run.begin(recipe(out, student={"steps": 4})) == 0
    save(run, 7)
    same_run = recipe(out, student={"steps": 4}, optim={"lr": 1e-6})
    assert run.begin(same_run) == 7
    for changed, message in [
        ({"student": {"steps": [1, 4]}}, "student.steps=[4], and this recipe has [1, 4]"),
        (
            {"method": {"name": f"{__name__}:Anything", "scale": 2}},
            "method.scale=1.0, and this recipe has 2.0",
        ),
        ({"family": "toy"}, "family."),
    ]:
        with pytest.raises(UserError) as error:
            run.begin(recipe(out, **{"student": {"steps": 4}, **changed}))
        assert message in str(error.value)
        assert "run.out=" in str(error.value) and "--fresh" in str(error.value)
    with pytest.raises(UserError, match=r"run\.resume is false"):
        run.begin(replace(same_run, run=replace(same_run.run, resume=False)))


def test_stages_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    stages = [{"run": {"steps": 2}}, {"run": {"steps": 3}, "method": {"scale": 3}}]
    run = RunDirectory(tmp_path)
    run.begin(recipe(tmp_path, stages=stages))
    save(run, 1)
    assert run.begin(recipe(tmp_path, stages=stages)) == 1
    stages[1]["method"] = {"scale": 4}
    with pytest.raises(UserError, match=r"stages\.1\.method\.scale=3, and this recipe has 4"):
        run.begin(recipe(tmp_path, stages=stages))
    stages[1]["method"] = {"scale": 3}
    with pytest.raises(UserError, match=r"stages\.1"):
        # None may go.
        run.begin(recipe(tmp_path, stages=stages[:1]))
    # But more may come.
    assert run.begin(recipe(tmp_path, stages=[*stages, {"run": {"steps": 4}}])) == 1


def test_fresh_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(recipe(run.path))
    save(run, 7)
    (run.path / "notes.txt").write_text("mine")
    assert run.begin(recipe(run.path, student={"steps": 2}), fresh=True) == 0
    assert run.latest() is None and (run.path / "notes.txt").read_text() == "mine"
    other = tmp_path / "not a run"
    (other / "student").mkdir(parents=True)
    (other / "student" / "thesis.txt").write_text("mine")
    RunDirectory(other).clear()
    assert (other / "student" / "thesis.txt").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; name a directory"):
        RunDirectory(tmp_path / "file").begin(recipe(tmp_path / "file"))
