"""Students of every family in their stock pipelines, where this project cannot be imported: the images of our sampler
from the same noise, the default call, and the model card's own code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import worlds
from models import SEEDS, TOLD, asked_for, everything, family_of
from stock import StockError, ask_stock, card_code, exported
from torch import Tensor

from stepdistill import export
from stepdistill.drawing import Sampler

# Rule and step counts of a student: the first is tried of one variant of each family, all of all variants slowly.
STUDENTS = [("renoise", (4,)), ("renoise", (1,)), ("renoise", (1, 4)), ("ode", (4,)), ("ode", (1, 4))]
# Their pipelines' schedulers take any number of steps, and these and their default guidance say nothing.
UNGUARDED = ("sana_sprint",)


class Fed(Sampler):
    """A sampler that starts from the seeds' noise and then renoises with what a stock scheduler drew."""

    fed: Sequence[Tensor] = ()

    def noise(self, seeds: Sequence[int]) -> Callable[[int], Tensor]:
        own = super().noise(seeds)
        if not self.fed:
            # The pipeline hands on the samples' generators.
            return own
        states = itertools.chain([own(0)], map(self.family_.from_stock_noise, self.fed))
        return lambda _: next(states)


def every_student() -> list[Any]:
    first, *others = STUDENTS
    slow = [
        pytest.param(variant, *student, marks=pytest.mark.slow)
        for variant in tiny.VARIANTS
        for student in others
    ]
    return [*tiny.one_of_each_family(*first), *slow]


def request(sampler: Sampler, **call: Any) -> dict[str, Any]:
    """What a stock process is asked for: the student's directory, called at its guidance and size."""
    family, card = sampler.family_, sampler.card
    call = family.stock_sampling(card.sampling, card.sampling.scale) | asked_for(family) | call
    loaded = {"directory": str(sampler.path), "load": family.stock_load()}
    return loaded | {"settings": {}, "call": call, "seeds": SEEDS}


def drawn_by_both(sampler: Sampler, tmp_path: Path, steps: int) -> tuple[Tensor, Tensor]:
    """Images or videos in [0, 1] of a student in `steps` steps: by our sampler and by its stock pipeline."""
    family = sampler.family_
    settings, told = family.stock_steps(sampler.sampling, steps)
    asked = request(sampler, num_inference_steps=steps, **told) | {"settings": settings}
    theirs, noises = ask_stock(tmp_path, **asked)
    ours = Fed(family, sampler.denoiser, sampler.path, sampler.card)
    ours.fed = noises
    with torch.no_grad():
        images = everything(family, ours.at(steps, chunk=2).x0(TOLD[family.conditions], SEEDS))
    return images, torch.from_numpy(theirs).movedim(-1, -3)


@pytest.mark.parametrize(("variant", "rule", "steps"), every_student())
def test_a_student_draws_the_same_images_in_its_stock_pipeline(variant, rule, steps, tmp_path):
    family, directory = family_of(variant), tmp_path / "student"
    method = worlds.method("dmd2", rule=rule, steps=steps)
    sampler = exported(family, method, directory, {"teacher": variant})
    assert sampler.sampling.rule == rule
    if export.beyond_stock(family, sampler.card):
        assert (family.name, rule, max(steps)) == ("sana_sprint", "ode", 4)
        assert "needs stepdistill" in (directory / "README.md").read_text()
        return
    for count in steps:
        ours, theirs = drawn_by_both(sampler, tmp_path, count)
        assert ours.std() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    drawn = card_code(directory, tmp_path)
    frames = (family.config.frames,) if family.output == "frames" else ()
    assert drawn.shape == (*frames, *family.resolution, 3) and drawn.std() > 0


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_the_default_call_of_a_students_directory_says_that_its_steps_are_wrong(variant, tmp_path):
    """Of renoising students of several steps: nothing of a scheduler's stops one step or the ODE."""
    family = family_of(variant)
    if family.name in UNGUARDED:
        pytest.skip("its scheduler takes any number of steps")
    sampler = exported(family, worlds.method("dmd2", steps=(4,)), tmp_path / "student", {"teacher": variant})
    for wrong in ({}, {"num_inference_steps": 5}):
        with pytest.raises(StockError, match=r"scale_factors|original_steps|inference steps"):
            ask_stock(tmp_path, **request(sampler, **wrong))
    images, _ = ask_stock(tmp_path, **request(sampler, num_inference_steps=4))
    assert np.isfinite(images).all()


@pytest.mark.parametrize("variant", ["sd3", "flux-schnell"])
def test_a_grid_that_is_not_even_is_passed_as_sigmas(variant, tmp_path):
    """Of every so many of 50 points, as LCM's students have it."""
    family = family_of(variant)
    method = worlds.method("dmd2", steps=(4,), finest=50)
    sampler = exported(family, method, tmp_path / "student", {"teacher": variant})
    assert "sigmas=[1.0, 0.76, 0.5, 0.26]" in (tmp_path / "student" / "README.md").read_text()
    ours, theirs = drawn_by_both(sampler, tmp_path, 4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_no_stock_pipeline_can_be_told_the_card_says():
    for variant, settings, says in (
        ("wan", {"steps": (4,), "finest": 50}, "takes a number of steps alone"),
        ("flux-schnell", {"steps": (1,), "first_rho": 2.5}, "start from noise alone"),
        ("sana-sprint", {"steps": (1,), "first_rho": 2.5}, "starts from noise alone"),
        ("sana-sprint", {"steps": (1, 4), "finest": 50}, "lists even angles"),
    ):
        family = family_of(variant)
        assert says in family.beyond_stock(worlds.method("dmd2", **settings).sampling)
