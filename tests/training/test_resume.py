"""Every registered method: a run that stops half-way and goes on ends with the weights of one that did not stop, in
a later stage as well.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from runs import metrics, of_method
from tiny import ar

import stepdistill
from stepdistill.methods import METHODS
from training.checkpoint import Checkpoint, RunDirectory
from training.recipe import Recipe, recipe_from
from training.run import run

# The rewards and eyes of the tests are code of their own.
pytestmark = pytest.mark.usefixtures("short_runs", "own_code")


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Whatever a checkpoint nests, by the path to it."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: value}


def state(found: Checkpoint) -> dict[str, Any]:
    return flat([found.tensors, found.optimizers, found.extra["counters"]])


def assert_goes_on_alike(recipe: Recipe, before: int, end: int) -> None:
    """Run to the end, forget all after checkpoint `before`, run again: the same to the last bit."""
    run(recipe)
    directory = RunDirectory(recipe.run.out, 9)
    middle, whole = state(directory.load(before)), state(directory.load(end))
    shutil.rmtree(directory.checkpoints / str(end))
    assert directory.latest() == before
    log = metrics(directory.path)
    run(recipe)
    assert metrics(directory.path) == log
    again = state(directory.load(end))
    assert again.keys() == whole.keys()
    moved = False
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[key]), key
            moved |= not torch.equal(value, middle[key])
        elif "seconds" not in key:
            assert value == again[key], key
    # The second half did train.
    assert moved


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    """From the middle of a turn, where networks take turns."""
    assert_goes_on_alike(of_method(name, tmp_path / "run"), 3, 5)


@pytest.mark.parametrize("method", [{"name": "dd1", "pair_count": 16}, {"name": "dd2", "imitation_steps": 2}])
def test_a_resumed_run_of_codes_equals_an_uninterrupted_one(method, tmp_path):
    """Its pairs come from the teacher's map, and its student leaves as a directory of its own kind."""
    mapping = of_method("kd", tmp_path / "run").mapping() | {
        "family": {"name": "ar", "teacher": str(ar.directory())},
        "method": method | {"guidance_scale": 2.0},
        "data": {"name": "scenes", "size": 40},
    }
    assert_goes_on_alike(recipe_from(mapping), 3, 5)
    sampler = stepdistill.load(tmp_path / "run" / "student")
    assert sampler.steps == (1, 2) and sampler(["a star"], seeds=[0]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("progressive", {"predecessor": "teacher"}, {"predecessor": "student"}),
        ("lightning", {"predecessor": "teacher"}, {"predecessor": "student"}),
        ("lightning", {"predecessor": "student"}, {"predecessor": "same", "conditional": False}),
    ],
)
def test_a_run_resumed_in_its_second_stage_equals_an_uninterrupted_one(name, first, second, tmp_path):
    """The predecessor is the one the stage began with, not the student as it is found."""
    stages = [
        {"method": method, "student": {"steps": [steps]}, "run": {"steps": 5}}
        for method, steps in ((first, 4), (second, 2))
    ]
    mapping = of_method(name, tmp_path / "run").mapping()
    del mapping["run"]["steps"]
    assert_goes_on_alike(recipe_from(mapping | {"stages": stages}), 8, 10)


@pytest.mark.parametrize("name", ["dmd2", "lcm"])
def test_the_student_of_a_partition_of_one_is_the_single_student(name, tmp_path):
    found = []
    for out, partition in ((tmp_path / "single", ""), (tmp_path / "one", "1/1")):
        mapping = of_method(name, out).mapping()
        mapping["data"]["partition"] = partition
        run(recipe_from(mapping))
        found.append(flat(RunDirectory(out, 9).load(5).tensors))
    single, one = found
    assert single.keys() == one.keys()
    assert all(torch.equal(value, one[key]) for key, value in single.items())
