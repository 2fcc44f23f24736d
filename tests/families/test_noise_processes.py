"""The process a student leaves with is the one it was trained along: its table, its prediction, what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import worlds
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from models import SEEDS
from stock import exported
from tiny.sd import build

from stepdistill import load
from stepdistill.errors import UserError
from stepdistill.families.schedulers import few_step_scheduler, schedule_of
from stepdistill.families.sd import SD
from stepdistill.methods.assemble import assemble
from stepdistill.sampling import Sampling

PROMPTS = ["a red circle", "two stars"]
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
TEACHERS = {
    "zero terminal signal": DDIMScheduler(**SD_BETAS, **V, rescale_betas_zero_snr=True),
    "zero terminal signal kept at 2^-24": EulerDiscreteScheduler(
        **SD_BETAS, **V, rescale_betas_zero_snr=True
    ),
    "sigmoid betas": DDPMScheduler(beta_schedule="sigmoid", beta_start=0.0001, beta_end=0.02),
    "cosine betas": DDPMScheduler(beta_schedule="squaredcos_cap_v2", **V),
    "plain": DDIMScheduler(**SD_BETAS),
}
SAMPLINGS = {
    "renoise": Sampling(steps=(1, 4)),
    "ode": Sampling(steps=(4,), rule="ode"),
    "tcd": Sampling(steps=(4,), rule="tcd", eta=0.3),
    "sigma": Sampling(steps=(1,), init_noise="sigma"),
}


@pytest.fixture
def teacher(tmp_path):
    """Directory of a tiny Stable Diffusion with a scheduler of one's choice."""

    def made(scheduler, name: str = "teacher") -> Path:
        torch.manual_seed(0)
        pipeline = build()
        pipeline.scheduler = scheduler
        pipeline.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("scheduler", TEACHERS.values(), ids=TEACHERS)
def test_the_noise_levels_of_training_and_of_the_exported_scheduler_agree(scheduler, sampling):
    trained, kind = schedule_of(scheduler)
    left, left_kind = schedule_of(few_step_scheduler(scheduler, sampling, trained))
    times = torch.tensor([0.0, 249.0, 499.0, 749.0, 998.0, 999.0])
    assert kind == left_kind
    torch.testing.assert_close(left.alpha(times), trained.alpha(times), rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(left.rho(times[:-1]), trained.rho(times[:-1]), rtol=1e-4, atol=0)
    assert left.ends_without_signal == trained.ends_without_signal


def drawn(directory: Path, steps: int, **call) -> torch.Tensor:
    stock = DiffusionPipeline.from_pretrained(directory)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    call = {"num_inference_steps": steps, "output_type": "pt", "height": 32, "width": 32} | call
    return stock(PROMPTS, generator=generators, **call).images


@pytest.mark.parametrize(
    ("scheduler", "method", "steps"),
    [
        ("zero terminal signal", "dmd2", 1),
        ("zero terminal signal", "dmd2", 4),
        ("zero terminal signal", "sim", 1),
        ("zero terminal signal", "progressive", 4),
        ("zero terminal signal kept at 2^-24", "dmd2", 4),
        ("sigmoid betas", "dmd2", 4),
        ("cosine betas", "progressive", 4),
    ],
)
def test_a_student_draws_alike_in_memory_and_exported(teacher, tmp_path, scheduler, method, steps):
    family = SD.from_directory(teacher(TEACHERS[scheduler]))
    path = tmp_path / "student"
    sampler = exported(family, worlds.method(method, steps=(steps,)), path, {"teacher": ""})
    ours = sampler(PROMPTS, SEEDS, steps=steps, chunk=2)
    theirs = drawn(path, steps)
    assert (theirs * 255 - ours).abs().max() <= 1
    assert (load(path)(PROMPTS, SEEDS, steps=steps, chunk=2).int() - ours).abs().max() <= 1


def test_eps_where_no_signal_is_left_is_refused_unless_the_student_starts_before(teacher):
    scheduler = DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True)
    family = SD.from_directory(teacher(scheduler))
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr.*student\.first_rho"):
        assemble(worlds.method("dmd2"), family)
    assemble(worlds.method("dmd2", first_rho=14.0), family)
    # The ODE's grid begins at the end all the same.
    with pytest.raises(UserError, match=r"undefined; give a teacher of v_prediction"):
        assemble(worlds.method("progressive", first_rho=14.0), family)
    assemble(worlds.method("dmd2"), SD.from_directory(teacher(TEACHERS["zero terminal signal"], "v")))


def test_a_student_that_another_starts_from_keeps_its_prediction(teacher, tmp_path):
    """A v student of a v teacher goes on beside a teacher of eps."""
    v = SD.from_directory(teacher(DDIMScheduler(**SD_BETAS, **V), "v"))
    exported(v, worlds.method("dmd2", steps=(2,)), tmp_path / "first", {"teacher": ""})
    family = SD.from_directory(teacher(TEACHERS["plain"], "eps"))
    student = family.student(str(tmp_path / "first"), ())
    assert (student.kind, family.kind) == ("v", "eps")
    moved(family, student, worlds.method("dmd2", steps=(2,)), tmp_path / "second")


def test_a_student_of_another_noise_process_is_refused(teacher, tmp_path):
    other = SD.from_directory(teacher(TEACHERS["cosine betas"], "cosine"))
    exported(other, worlds.method("dmd2", steps=(2,)), tmp_path / "first", {"teacher": ""})
    with pytest.raises(UserError, match=r"student\.init=.*noise process"):
        SD.from_directory(teacher(TEACHERS["plain"])).student(str(tmp_path / "first"), ())


def test_a_student_of_a_shorter_table_goes_on_along_the_whole_one(teacher, tmp_path):
    family = SD.from_directory(teacher(TEACHERS["plain"]))
    exported(family, worlds.method("sid", steps=(1,), first_rho=2.5), tmp_path / "first", {"teacher": ""})
    student = family.student(str(tmp_path / "first"), ())
    assert student.native.t_max == 999
    moved(family, student, worlds.method("dmd2", steps=(2,)), tmp_path / "second")


def moved(family, student, method, path):
    """Exported as `method`'s student it draws in its stock pipeline what it draws in memory."""
    from stepdistill import export
    from stepdistill.drawing import Sampler

    recipe = {"family": {"teacher": ""}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    card = export.card_of(family, method, recipe)
    export.write(family, student, path, card)
    steps = max(method.sampling.steps)
    ours = Sampler(family, student, path, card)(PROMPTS, SEEDS, steps=steps, chunk=2)
    assert (drawn(path, steps) * 255 - ours).abs().max() <= 1


def test_a_guidance_scale_that_a_student_is_no_longer_told_leaves_no_trace(teacher, tmp_path):
    """One of LCM's goes on by a method that tells it none, though stock pipelines tell every such UNet."""
    family = SD.from_directory(teacher(TEACHERS["plain"]))
    exported(family, worlds.method("lcm", steps=(2,)), tmp_path / "lcm", {"teacher": ""})
    student = family.student(str(tmp_path / "lcm"), ())
    assert student.network.told == ("guidance",)
    moved(family, student, worlds.method("dmd2", steps=(2,)), tmp_path / "dmd2")
    # What LCM goes on with is told as before.
    again = family.student(str(tmp_path / "lcm"), ("guidance",))
    assert again.network.leaving(("guidance",)) is again.network.unet


def test_a_student_that_is_told_its_guidance_is_no_teacher(teacher, tmp_path):
    family = SD.from_directory(teacher(TEACHERS["plain"]))
    exported(family, worlds.method("lcm", steps=(2,)), tmp_path / "lcm", {"teacher": ""})
    with pytest.raises(UserError, match=r"family\.teacher.*time_cond_proj_dim"):
        assemble(worlds.method("dmd2"), SD.from_directory(tmp_path / "lcm"))
    # One of DMD2's leaves with a projection of zeros and can be one.
    exported(family, worlds.method("dmd2", steps=(2,)), tmp_path / "dmd2", {"teacher": ""})
    assemble(worlds.method("dmd2"), SD.from_directory(tmp_path / "dmd2"))
