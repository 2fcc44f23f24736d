"""Stages by the trainer: what one carries over from the one before, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch

from stepdistill.errors import UserError

pytestmark = pytest.mark.usefixtures("short_runs")


def backtracked(out, **run_) -> dict:
    method = {"name": "disback", "path": 2, "interval": 2, "base": {"name": "dmd2", "student_every": 1}}
    return {
        "family": {"name": "toy", "modes": 4, "fit_steps": 2},
        "method": method,
        "data": {"name": "toy"},
        "optim": {"batch_size": 8, "lr": 1e-2},
        "run": {"out": str(out), "save_every": 2, "keep": 9, "log_every": 1, "trackers": []} | run_,
        "stages": [
            {"method": {"stage": "degrade"}, "run": {"steps": 4}},
            {"method": {"stage": "backtrack"}, "run": {"steps": 4}},
        ],
    }


def test_the_second_stage_takes_over_what_the_first_recorded_and_resumes_bit_for_bit(tmp_path):
    from training.checkpoint import RunDirectory
    from training.recipe import recipe_from
    from training.run import run

    recipe = recipe_from(backtracked(tmp_path / "run"))
    run(recipe)
    directory = RunDirectory(tmp_path / "run", 9)
    recorded, at_6, at_8 = (directory.load(step).tensors for step in (4, 6, 8))
    assert set(recorded) >= {"fake_score", "path_1"}
    for name, value in recorded["path_1"].items():
        assert torch.equal(value, at_6["path_1"][name]) and torch.equal(value, at_8["path_1"][name])
    first = "network.enter.weight"
    # Two iterations apart.
    assert not torch.equal(recorded["path_1"][first], recorded["fake_score"][first])
    assert not torch.equal(at_6["student"][first], at_8["student"][first])
    shutil.rmtree(directory.checkpoints / "8")
    # Goes on in the second stage, at 6.
    run(recipe)
    again = directory.load(8).tensors
    for network, state in at_8.items():
        for name, value in state.items():
            assert torch.equal(value, again[network][name]), (network, name)


def test_a_degrade_stage_too_short_for_its_record_is_refused(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    short = backtracked(tmp_path / "run")
    # Of 2 to the first record.
    short["stages"][0]["run"]["steps"] = 1
    with pytest.raises(
        UserError, match=r"method\.path=2: the degrade stage recorded no path_1; give it run\.steps of"
    ):
        run(recipe_from(short))


@pytest.mark.parametrize("direction", ["into a composition", "out of one"])
def test_a_composition_and_a_plain_stage_carry_each_others_fake_score(tmp_path, direction):
    from training.checkpoint import RunDirectory
    from training.recipe import recipe_from
    from training.run import run

    def composed(**dmd2) -> dict:
        return {"name": "compose", "parts": [{"name": "dmd2", **dmd2}, {"name": "ladd"}]}

    if direction == "out of one":
        methods = [composed(), {"name": "dmd2", "carry_fake_score": True}]
        names = ["dmd2/fake_score", "fake_score"]
    else:
        methods = [{"name": "dmd2"}, composed(carry_fake_score=True)]
        names = ["fake_score", "dmd2/fake_score"]
    recipe = backtracked(tmp_path / "run")
    del recipe["method"]
    # The second stage does not move what it was given.
    recipe["stages"] = [
        {"method": methods[0], "run": {"steps": 3}},
        {"method": methods[1], "run": {"steps": 1}, "optim": {"lr": 1e-12}},
    ]
    run(recipe_from(recipe))
    directory = RunDirectory(tmp_path / "run", 9)
    first, second = (directory.load(step).tensors[name] for step, name in zip((3, 4), names, strict=True))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-9)


def test_which_of_two_fake_scores_is_carried_has_to_be_said(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    recipe = backtracked(tmp_path / "run")
    recipe["stages"] = [
        {
            "method": {
                "name": "compose",
                "parts": [{"name": "dmd2"}, {"name": "dmd", "regression_weight": 0.0}],
            },
            "run": {"steps": 1},
        },
        {"method": {"name": "f_distill", "carry_fake_score": True}, "run": {"steps": 1}},
    ]
    del recipe["method"]
    with pytest.raises(
        UserError, match=r"takes the network 'fake_score' over .* dmd/fake_score, dmd2/fake_score"
    ):
        run(recipe_from(recipe))


def test_a_lora_is_not_carried_as_a_whole_network(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    recipe = backtracked(tmp_path / "run")
    recipe["stages"] = [
        {"method": {"name": "vsd"}, "run": {"steps": 1}},
        {"method": {"name": "dmd2", "carry_fake_score": True}, "run": {"steps": 1}},
    ]
    del recipe["method"]
    with pytest.raises(UserError, match="whose 'fake_score' is of another make"):
        run(recipe_from(recipe))


def test_backtracking_without_a_record_is_refused(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    alone = backtracked(tmp_path / "run")
    alone["stages"] = alone["stages"][1:]
    with pytest.raises(UserError, match="takes the network 'fake_score' over from the stage before"):
        run(recipe_from(alone))
    unlike = backtracked(tmp_path / "other")
    unlike["stages"][0]["method"]["path"] = 1
    with pytest.raises(UserError, match=r"stages\.1\.method takes the network 'path_1' over"):
        run(recipe_from(unlike))
