"""A run tests its teacher first: what is declared right is verified, what is declared wrong is named, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from models import family_of
from PIL import Image
from runs import assert_same_run, interrupt_in, sd, toy
from torch import nn

from stepdistill import assets
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.loading import load
from stepdistill.prediction import Prediction
from stepdistill.schedule import VP, Flow, expand
from training import run as running
from training import teacher
from training.checkpoint import RunDirectory
from training.data import Source
from training.data.base import Unreadable
from training.denoising import LEVELS, REVERSED, VERIFIED, Errors, errors_of, readings
from training.recipe import Recipe
from training.teacher import assess, examples_of, judge

pytestmark = pytest.mark.usefixtures("short_runs")


SCHEDULES = {"vp": VP.from_betas(), "flow": Flow()}


class Plain(Family):
    """Pictures of one colour each, N(0, 1) in every channel: the mean over all places denoises them exactly. Its network
    gives what it knows as `kind`, which `declared` may call otherwise.
    """

    shape, resolution, conditions, own_data = (2, 8, 8), (8, 8), "none", True

    def __init__(self, schedule: str, kind: str, declared: str):
        self.schedule = SCHEDULES[schedule]
        self.teacher = Denoiser(Plane(self.schedule, kind), declared, self.schedule)

    def examples(self, source, indices):
        colours = torch.randn(len(indices), 2, 1, 1, generator=torch.Generator().manual_seed(1))
        return colours.expand(-1, *self.shape).contiguous()

    def encode(self, prompts):
        return None

    def uncond(self, count):
        return None


class Plane(nn.Module):
    def __init__(self, schedule, kind: str):
        super().__init__()
        self.schedule, self.kind = schedule, kind

    def forward(self, x_t, t, cond):
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        x0 = (alpha / (alpha**2 + sigma**2 / 64) * x_t.mean((2, 3), keepdim=True)).expand_as(x_t)
        said = Prediction(x0, "x0", x_t, t, self.schedule)
        return -said.flow if self.kind == REVERSED else getattr(said, self.kind)


ALL = Source(Source)
ALL.size = 512


def verdict(family, source=None):
    return judge(family, examples_of(family, source, "cpu", 64), 64)


KINDS = {"vp": ("eps", "v", "x0"), "flow": ("flow", REVERSED, "eps", "v", "x0")}


@pytest.mark.parametrize(("schedule", "kind"), [(name, kind) for name in KINDS for kind in KINDS[name]])
def test_every_reading_is_told_from_every_other(schedule, kind):
    for declared in KINDS[schedule]:
        # No scheduler stands for the other sign.
        declared = "flow" if declared == REVERSED else declared
        family = Plain(schedule, kind, declared)
        found = verdict(family, ALL)
        assert found.errors.best == kind and found.errors.mean(kind) < VERIFIED
        assert found.verified == (declared == kind) and found.fits == ("" if declared == kind else kind)
        assert (found.wrong(family) == "") == (declared == kind)
        assert ("as declared" in found.line()) == (declared == kind)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_network_that_says_nothing_is_at_best_the_best_linear_denoiser(schedule):
    """Zero, by any reading, is a multiple of x_t: the least error is the linear denoiser's own."""
    x0 = Plain(schedule, "x0", "x0").examples(ALL, range(512))
    for scale in (1.0, 0.3, 4.0):
        errors = errors_of(Denoiser(_Silent(), "eps", SCHEDULES[schedule]), x0 * scale, None, chunk=512)
        assert set(errors.levels) == set(readings(SCHEDULES[schedule], "eps"))
        assert all(value > 0.97 for values in errors.levels.values() for value in values)


class _Silent(nn.Module):
    def forward(self, x_t, t, cond):
        return torch.zeros_like(x_t)


def test_the_best_linear_denoiser_has_the_error_the_others_are_measured_by():
    """Of Gaussian data of variance v the exact denoiser is linear: 1 at every level."""
    v = 0.36
    x0 = torch.randn(4096, 2, 2, 2, generator=torch.Generator().manual_seed(1)) * v**0.5
    exact = Denoiser(_Gaussian(v), "x0", SCHEDULES["flow"])
    errors = errors_of(exact, x0, None, kinds=("x0",), chunk=4096)
    assert errors.levels["x0"] == pytest.approx([1.0] * len(LEVELS), abs=0.02)


class _Gaussian(nn.Module):
    def __init__(self, v: float):
        super().__init__()
        self.v = v

    def forward(self, x_t, t, cond):
        alpha, sigma = (1 - t).reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1)
        return (alpha * self.v / (alpha**2 * self.v + sigma**2) * x_t).to(x_t.dtype)


def test_a_network_that_is_not_finite_is_verified_by_no_reading():
    errors = Errors({"eps": (float("nan"),) * 5, "v": (float("inf"),) * 5})
    assert not errors.verified("eps") and errors.clearly_better("eps") == ""


# ------------------------------------------------------------------------------------ pipelines with and without training


@pytest.fixture(scope="module")
def embedded():
    return load(assets.path("teacher")).family_


def test_the_embedded_teacher_is_verified_and_a_wrong_setting_is_named(embedded, monkeypatch):
    examples = examples_of(embedded, None, "cpu", 8)
    found = judge(embedded, examples, 8)
    assert examples.where == "drawn scenes" and found.verified and not found.wrong(embedded)
    assert found.errors.mean("v") < 0.5
    monkeypatch.setattr(embedded.teacher, "kind", "eps")
    said = judge(embedded, examples, 8).wrong(embedded)
    assert "prediction_type=epsilon" in said and "set prediction_type to v_prediction" in said


@pytest.mark.parametrize("wrong", [0.1, 2.0])
def test_a_wrong_scaling_of_latents_is_named_with_the_one_that_fits(embedded, wrong):
    right = embedded.vae.config.scaling_factor
    embedded.vae.register_to_config(scaling_factor=wrong)
    try:
        found = verdict(embedded)
        said = found.wrong(embedded)
    finally:
        embedded.vae.register_to_config(scaling_factor=right)
    assert not found.verified and found.factor * wrong == pytest.approx(right, rel=0.15)
    assert f"scaling_factor={wrong:g}" in said


FAST = ("sd15", "dit", "wan")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in FAST else pytest.mark.slow) for v in tiny.VARIANTS]
)
def test_random_weights_are_neither_verified_nor_refused(variant):
    family = family_of(variant)
    found = verdict(family)
    assert not found.verified and found.wrong(family) == "" and "could not be verified" in found.line()


@pytest.mark.parametrize("seed", range(3))
def test_no_random_weights_look_like_a_trained_network(tiny_sd, seed):
    family = load(tiny_sd).family_
    torch.manual_seed(seed)
    for parameter in family.teacher.parameters():
        parameter.data.normal_(0, 0.3 / max(parameter.numel() / len(parameter), 1) ** 0.5 * 4**seed)
    errors = verdict(family).errors
    assert set(errors.levels) == {"eps", "v", "x0"}
    assert all(errors.mean(kind) > VERIFIED for kind in errors.levels)


def test_pixels_with_and_without_classes_are_tried(tiny_pixel, tiny_ddpm):
    for path, kinds in ((tiny_pixel, {"x0"}), (tiny_ddpm, {"eps", "v", "x0"})):
        family = load(path).family_
        found = verdict(family)
        assert set(found.errors.levels) == kinds and not found.verified and found.wrong(family) == ""


class Gone(Source):
    """Images that could be read when the run was begun."""

    def images(self, indices):
        raise Unreadable(0, "it is gone")


def test_data_that_cannot_be_read_any_more_leave_the_test_to_scenes(tiny_sd):
    family, gone = load(tiny_sd).family_, Gone(Source)
    gone.size, gone.image_size = 4, family.resolution
    assert examples_of(family, gone, "cpu", 4).where == "drawn scenes"


def test_images_of_several_sizes_are_those_of_one_bucket(tiny_sd, tmp_path):
    for number, size in enumerate(((16, 16), (16, 24), (16, 16), (24, 16), (16, 16))):
        Image.new("RGB", size[::-1], (40 * number, 90, 200 - 30 * number)).save(tmp_path / f"{number}.png")
    data = {
        "name": "folder",
        "path": str(tmp_path),
        "resolution": 16,
        "aspect_ratio_buckets": [[16, 16], [16, 24]],
    }
    source = sd(tmp_path / "run", tiny_sd, data=data).data.make()
    family = load(tiny_sd).family_
    examples = examples_of(family, source, "cpu", 4)
    assert source.bucketed and examples.where == "its data"
    assert examples.x0.shape == (len(source.buckets[0].members), *family.shape_at(source.buckets[0].size))
    assert judge(family, examples, 4).wrong(family) == ""


# ----------------------------------------------------------------------------------------------------------- in a run


def wrongly_declared(folder: Path) -> Path:
    shutil.copytree(assets.path("teacher"), folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    return folder


def test_a_run_refuses_a_teacher_that_is_declared_wrong(tmp_path):
    path = wrongly_declared(tmp_path / "wrong")
    recipe = _embedded(tmp_path / "run", path)
    with pytest.raises(UserError, match=r"set prediction_type to v_prediction .*run\.check_teacher=false"):
        running.run(recipe)
    assert RunDirectory(tmp_path / "run").latest() is None
    running.run(_embedded(tmp_path / "run", path, "run.check_teacher=false", "run.steps=1"))
    assert RunDirectory(tmp_path / "run").latest() == 1


def _embedded(out: Path, path: Path, *overrides: str) -> Recipe:
    method, data = {"name": "dmd2", "student_every": 1, "guidance_scale": 1.0}, {"name": "scenes", "size": 4}
    return sd(out, path, "optim.batch_size=1", *overrides, method=method, data=data)


def test_a_run_is_the_same_with_and_without_the_test(tmp_path, tiny_sd):
    for name, on in (("with", "true"), ("without", "false")):
        running.run(sd(tmp_path / name, tiny_sd, f"run.check_teacher={on}", "run.steps=2"))
    assert_same_run(tmp_path / "with", tmp_path / "without")


def test_the_test_leaves_every_generator_as_it_was(tmp_path, tiny_sd):
    recipe = sd(tmp_path / "run", tiny_sd)
    family, sources = running.build(recipe)
    before = torch.get_rng_state()
    weights = [parameter.clone() for parameter in family.teacher.parameters()]
    assert assess(recipe, family, sources[0], "cpu", 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, weights, family.teacher.parameters()))


def test_a_resumed_run_does_not_test_again(tmp_path, tiny_sd, monkeypatch, capsys):
    recipe = sd(tmp_path / "run", tiny_sd, "run.steps=2", "optim.batch_size=1")
    with monkeypatch.context() as patch:
        interrupt_in(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            running.run(recipe)
    assert "whether the teacher predicts v could not be verified on its data" in capsys.readouterr().err
    monkeypatch.setattr(running, "assess", lambda *_: pytest.fail("tested again"))
    running.run(recipe)


def test_what_has_no_teacher_or_declares_nothing_is_not_tested(tmp_path, tiny_sd, monkeypatch):
    monkeypatch.setattr(teacher, "judge", lambda *_: pytest.fail("tested"))
    off = sd(tmp_path / "off", tiny_sd, "run.check_teacher=false")
    fresh = sd(tmp_path / "fresh", tiny_sd, "student.init=random", method={"name": "pretrain"})
    for recipe in (off, fresh, toy(tmp_path / "toy")):
        family, (source,) = running.build(recipe)
        assert assess(recipe, family, source, "cpu", 4) == ""
