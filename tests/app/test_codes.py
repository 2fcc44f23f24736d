"""Students of codes, in directories of the project's own, are served as any other."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import ar
from worlds import method

import stepdistill
from app.engine import Engine
from app.request import Invalid, Request
from stepdistill import export
from stepdistill.families.autoregressive import Autoregressive

CAPTION = "a large red star on a black background"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("codes") / "student"
    family = Autoregressive.from_directory(ar.directory())
    recipe = {"run": {"out": "runs/x"}, "method": {"name": "dd1"}, "family": {"teacher": "t"}}
    export.write(family, family.student("teacher", ()), path, export.card_of(family, method("dd1"), recipe))
    engine = Engine(path, ar.directory(), device="cpu").start().wait(60)
    yield path, engine
    engine.close()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_of_codes_is_served_as_the_sampler_draws_it(served, steps):
    path, engine = served
    result = engine.generate(Request(CAPTION, seed=3, steps=steps))
    direct = stepdistill.load(path)([CAPTION], [3], steps=steps)[0].permute(1, 2, 0).numpy()
    assert np.abs(result.image.astype(int) - direct).max() <= 1
    assert engine.limits["student"].steps == (1, 2)


def test_its_teacher_takes_a_pass_for_each_place_from_the_same_noise(served):
    _, engine = served
    result = engine.generate(Request(CAPTION, seed=3, model="teacher"))
    teacher = stepdistill.load(ar.directory())
    direct = teacher([CAPTION], [3])[0].permute(1, 2, 0).numpy()
    assert np.abs(result.image.astype(int) - direct).max() <= 1
    assert engine.limits["teacher"].default_steps == ar.LENGTH


def test_steps_a_student_was_not_trained_for_are_refused(served):
    _, engine = served
    with pytest.raises(Invalid, match="steps"):
        engine.generate(Request(CAPTION, seed=3, steps=3))
