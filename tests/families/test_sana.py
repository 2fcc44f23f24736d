"""SANA's instruction, masks and solvers, and SANA-Sprint's time and scale."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler
from models import TOLD, drawn_by_both, family_of
from stock import assert_comes_back, exported, stock_images
from worlds import method

from stepdistill.errors import UserError
from stepdistill.families.sana import Sana
from stepdistill.schedule import Flow, TrigFlow


def test_prompts_follow_the_instruction_and_negative_ones_do_not():
    plain, told = family_of("sana"), family_of("sana", instruction=True)
    one, other = plain.encode(TOLD["prompt"]), told.encode(TOLD["prompt"])
    assert one["prompt"].shape == other["prompt"].shape == (2, 16, 16)
    assert not torch.equal(one["prompt"], other["prompt"])
    for name, value in told.encode_negative(TOLD["prompt"]).items():
        assert torch.equal(value, one[name])
    for name, value in told.uncond(2).items():
        assert torch.equal(value, plain.encode(["", ""])[name])


def test_with_its_instruction_a_teacher_equals_the_stock_pipeline():
    ours, theirs = drawn_by_both(family_of("sana", instruction=True), tiny.directory("sana"), 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_published_scheduler_stands_for_the_same_flow(tmp_path):
    """SANA's is DPM++ with a flow's shift."""
    pipeline = family_of("sana").pipeline
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline.save_pretrained(tmp_path / "sana")
    family = Sana.from_directory(tmp_path / "sana", {"max_tokens": 16})
    assert isinstance(family.schedule, Flow) and family.schedule.shift == 3.0
    assert family.schedule.teacher_grid(4) == family_of("sana").schedule.teacher_grid(4)


@pytest.mark.parametrize("steps", [(2,), (1, 2)])
def test_a_sprint_student_of_two_steps_may_have_its_own_second_time(steps, tmp_path):
    directory, family = tmp_path / "student", family_of("sana-sprint")
    sampler = exported(family, method("scm", steps=steps, middle_time=1.3), directory, {"teacher": "sprint"})
    # sCM starts at rho = 80, where all but the ten-thousandth part is noise.
    assert sampler.times(2) == (pytest.approx(math.atan(80)), 1.3)
    _, told = family.stock_steps(sampler.sampling, 2)
    call = family.stock_sampling(sampler.sampling, sampler.sampling.scale) | told
    ours = sampler(TOLD["prompt"], [5, 6], steps=2, chunk=2)
    theirs = stock_images(
        directory, tmp_path, prompt=TOLD["prompt"], num_inference_steps=2, seeds=[5, 6], **call
    )
    assert abs(theirs * 255 - ours.permute(0, 2, 3, 1).numpy()).max() <= 1.0
    assert_comes_back(directory, sampler, TOLD["prompt"], [5, 6], steps=2, chunk=2)


def test_sprint_is_told_a_scale_and_speaks_trigflow():
    family = family_of("sana-sprint", embedded_guidance=3.0)
    assert isinstance(family.schedule, TrigFlow) and isinstance(family.teacher.native, Flow)
    x, t, cond = (
        torch.randn(2, *family.shape),
        torch.tensor([0.4, 1.2], dtype=torch.float64),
        family.encode(TOLD["prompt"]),
    )
    assert cond["guidance"].tolist() == [3.0, 3.0]
    with torch.no_grad():
        by_cond = family.teacher(x, t, cond).x0
        same = family.teacher(x, t, cond, guidance=torch.full((2,), 3.0)).x0
        other = family.teacher(x, t, cond, guidance=torch.full((2,), 4.5)).x0
    assert torch.equal(by_cond, same) and not torch.allclose(by_cond, other)


def test_sides_are_what_the_pipeline_takes():
    with pytest.raises(UserError, match="multiples of 32"):
        family_of("sana", resolution=[32, 48])
    ours, theirs = drawn_by_both(family_of("sana", resolution=[32, 64]), tiny.directory("sana"), 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
