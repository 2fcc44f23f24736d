"""How a student is sampled goes from stage to stage of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from stepdistill.errors import UserError
from stepdistill.sampling import Sampling
from training.recipe import recipe_from

TOY = {"family": "toy", "data": "toy", "run": {"steps": 1, "out": "runs/x"}}


def sampled(*stages: dict, **student: Any) -> list[Sampling]:
    """The sampling of each stage on the toy; a stage is a method section, and may hold a `student` section."""
    recipe = recipe_from(
        TOY
        | {
            "student": {"steps": [1], **student},
            "stages": [
                {
                    "method": {k: v for k, v in stage.items() if k != "student"},
                    "student": stage.get("student"),
                }
                for stage in stages
            ],
        }
    )
    return [stage.sampling for stage in recipe.stages()]


def test_a_later_stage_samples_as_the_stage_before_where_its_method_says_nothing():
    first, second = sampled({"name": "sim"}, {"name": "reward"})
    assert first == second == Sampling((1,), "renoise", 2.5, "sigma")
    tscd, ladd = sampled({"name": "tscd", "segments": 2}, {"name": "ladd"}, steps=[1, 2])
    assert tscd == ladd == Sampling((1, 2), "tcd", eta=0.3)
    # A paper that says how its student is sampled is heard, and a recipe's own word goes first.
    ends = sampled({"name": "lightning", "mse_weight": 1.0}, {"name": "dmd2"}, first_rho=4.0)
    assert [(each.rule, each.first_rho) for each in ends] == [("ode", 4.0), ("renoise", 4.0)]
    own = sampled({"name": "sim"}, {"name": "kd", "student": {"first_rho": 0.0}}, {"name": "kd"})
    assert [each.first_rho for each in own] == [2.5, 0.0, 0.0]
    assert [each.init_noise for each in own] == ["sigma"] * 3


def test_what_a_student_is_told_is_each_methods_own():
    lcm, dmd2 = sampled({"name": "lcm", "ddim_steps": 8}, {"name": "dmd2"}, steps=[1, 2])
    assert (lcm.inputs, lcm.guidance, lcm.points) == (("guidance",), "input", 8)
    assert (dmd2.inputs, dmd2.guidance, dmd2.points) == ((), "none", 8)


def test_a_many_step_model_leaves_its_students_to_be_sampled_anew():
    teacher, student = sampled({"name": "tsm"}, {"name": "ladd"})
    assert (teacher.rule, student.rule) == ("ode", "renoise")


def test_a_rule_the_method_cannot_train_for_is_refused():
    with pytest.raises(UserError, match=r"^student\.rule must be flowmap for MeanFlow, got ode\.$"):
        recipe_from(TOY | {"method": "meanflow", "student": {"rule": "ode"}}).new_method()


def test_a_part_is_refused_by_its_place_in_the_recipe():
    parts = [{"name": "dmd2"}, {"name": "kd"}, {"name": "dmd2", "student_every": 0}]
    recipe = recipe_from(TOY | {"method": {"name": "compose", "parts": parts}})
    with pytest.raises(UserError, match=r"^method\.parts\.2\.student_every must be at least 1, got 0\.$"):
        recipe.new_method()
    recipe = recipe_from(TOY | {"method": {"name": "disback", "base": {"name": "sid", "student_every": 0}}})
    with pytest.raises(UserError, match=r"^method\.base\.student_every must be at least 1, got 0\.$"):
        recipe.new_method()
