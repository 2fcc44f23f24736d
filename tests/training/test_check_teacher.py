"""`training.check_teacher`: what it says of a teacher, without images too, and how it ends."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
from models import SETTINGS
from PIL import Image
from runs import sd, toy
from test_teacher import SCHEDULES, Plain
from torch import nn

from stepdistill import assets
from stepdistill.config import dump
from stepdistill.denoiser import Denoiser
from stepdistill.loading import load
from stepdistill.schedule import Flow
from training import own_samples, teacher_report
from training.check_teacher import main
from training.denoising import REVERSED, VERIFIED
from training.own_samples import judge_by_itself
from training.teacher import examples_of, judge, some_prompts
from training.teacher_report import memory_of, tables_of

pytestmark = pytest.mark.usefixtures("short_runs")
QUIET = ("--no-pictures", "--methods", "none")


def said(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("schedule", "kind"), [("vp", "eps"), ("vp", "v"), ("vp", "x0"), ("flow", "flow"), ("flow", REVERSED)]
)
def test_without_images_each_reading_is_judged_on_its_own_samples(schedule, kind):
    declared = "flow" if kind == REVERSED else kind
    found = judge_by_itself(Plain(schedule, kind, declared), range(64), "cpu", 64)
    assert found.errors.best == kind and found.errors.mean(kind) < VERIFIED
    others = [reading for reading in found.errors.levels if reading != kind]
    assert others and all(found.errors.mean(other) > 2 * found.errors.mean(kind) for other in others)
    assert found.verified == (declared == kind) and found.fits == ("" if declared == kind else kind)


class Converted(nn.Module):
    """The answers of a trained denoiser as another kind."""

    def __init__(self, denoiser: Denoiser, kind: str):
        super().__init__()
        self.denoiser, self.kind = denoiser, kind

    def forward(self, x_t, t, cond):
        said = self.denoiser(x_t, t, cond)
        return -said.flow if self.kind == REVERSED else getattr(said, self.kind)


@pytest.mark.slow
@pytest.mark.parametrize(("flow", "kind"), [(0, "eps"), (0, "v"), (0, "x0"), (1, "flow"), (1, REVERSED)])
def test_a_trained_teacher_is_told_with_and_without_images(flow, kind):
    """The table of docs/teachers.md."""
    family = load(assets.path("teacher")).family_
    schedule = Flow() if flow else family.schedule
    network = Converted(family.teacher.under(schedule), kind)
    family.teacher = Denoiser(network, "flow" if kind == REVERSED else kind, schedule)
    prompts = some_prompts(family, None, range(own_samples.COUNT))
    for found in (
        judge(family, examples_of(family, None, "cpu", 16), 16),
        judge_by_itself(family, prompts, "cpu", 16),
    ):
        assert found.errors.best == kind and found.errors.mean(kind) < 0.3
        assert found.fits == (kind if kind == REVERSED else "") and found.verified == (kind != REVERSED)
        assert all(found.errors.mean(other) > 0.5 for other in found.errors.levels if other != kind)


def test_samples_of_random_weights_verify_nothing(tiny_sd):
    family = load(tiny_sd).family_
    found = judge_by_itself(family, ["a", "b", "c", "d"], "cpu", 8)
    assert set(found.errors.levels) == {"eps", "v", "x0"} and not found.verified and not found.fits


@pytest.fixture(autouse=True)
def short_walks(monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.setattr(own_samples, "STEPS", 4)


def test_a_report_says_what_a_teacher_is(tiny_sd, capsys):
    report = said(capsys, str(tiny_sd), *QUIET)
    assert (report["pipeline"], report["family"]) == ("StableDiffusionPipeline", "sd")
    assert report["process"]["zero terminal SNR"] == "no" and "scaled_linear" in report["process"]["betas"]
    assert [test["where"] for test in report["tests"]] == ["drawn scenes", "samples of its own"]
    assert not report["verified"] and report["wrong"] == []
    assert len(report["latents"]["std"]) == 4 and report["tables"] == {}


def test_a_recipe_is_tested_on_its_own_data_where_that_has_images(tiny_sd, tmp_path, capsys):
    recipe, prompts = tmp_path / "mine.yaml", tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    recipe.write_text(dump(sd(tmp_path / "run", tiny_sd)))
    assert [test["where"] for test in said(capsys, str(recipe), *QUIET)["tests"]] == ["its data"]
    data, method = {"name": "prompts", "path": str(prompts)}, {"name": "sim"}
    recipe.write_text(dump(sd(tmp_path / "run", tiny_sd, data=data, method=method)))
    tried = [test["where"] for test in said(capsys, str(recipe), *QUIET)["tests"]]
    assert tried == ["drawn scenes", "samples of its own"]


def test_images_of_a_folder_are_taken(tiny_sd, tmp_path, capsys):
    for number in range(3):
        Image.new("RGB", (20, 16), (80 * number, 10, 200)).save(tmp_path / f"{number}.png")
    report = said(capsys, str(tiny_sd), "--images", str(tmp_path), *QUIET)
    assert [test["where"] for test in report["tests"]] == ["its data"]


def test_a_wrong_teacher_ends_with_1_and_says_what_fits(tmp_path, capsys):
    path = tmp_path / "wrong"
    shutil.copytree(assets.path("teacher"), path)
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(SystemExit) as ended:
        main([str(path), *QUIET])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "WRONG" in out and "set prediction_type to v_prediction" in out


def test_another_table_that_fits_better_is_named():
    """A network that knows its noise level by its time alone: along another table it is told a wrong one."""
    family = Plain("vp", "x0", "x0")

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    family.pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=config))
    examples = teacher_report.Examples(family.examples(None, range(512)), None, "its data")
    found, wrong = tables_of(family, "x0", examples, 64)
    assert wrong == "" and len(found) == 4 and min(found, key=found.get).endswith("as declared")
    # The same network, declared to be of another table.
    family.teacher.native = family.teacher.schedule = type(SCHEDULES["vp"]).from_betas("linear", 1e-4, 0.02)
    found, wrong = tables_of(family, "x0", examples, 64)
    assert "along scaled_linear 0.00085 to 0.012" in wrong and "do not fit" in wrong


@pytest.mark.slow
def test_memory_is_that_of_the_forecast_and_adapters_take_less(tiny_sd):
    family = load(tiny_sd).family_
    rows = memory_of(family, None, ["sim"])
    full, lora = (float(size.replace(",", "")) for size in rows["sim"])
    assert 0 < lora <= full


def test_three_guidance_scales_are_drawn_where_a_teacher_takes_them(tiny_sd, tmp_path, capsys):
    draw = ("--methods", "none", "--steps", "2", "--prompt", "a red circle", "--out", str(tmp_path / "out"))
    report = said(capsys, str(tiny_sd), *draw)
    with Image.open(report["pictures"]) as picture:
        assert picture.format == "PNG" and picture.width > 3 * 150


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dit", "wan", "flux-dev", "sana-sprint", "sdxl"])
def test_every_kind_of_teacher_is_looked_at_and_drawn(variant, tmp_path, capsys):
    settings = SETTINGS.get(tiny.VARIANTS[variant][0], {})
    small = [f"family.{key}={value}" for key, value in settings.items()]
    how = ("--methods", "dmd2", "--steps", "2", "--out", str(tmp_path))
    report = said(capsys, str(tiny.directory(variant)), *small, *how)
    assert report["wrong"] == [] and not report["verified"] and set(report["memory"]) == {"dmd2"}
    assert Image.open(report["pictures"]).format == "PNG"


def test_pixels_and_classes_are_looked_at(tiny_pixel, tmp_path, capsys):
    report = said(capsys, str(tiny_pixel), "--methods", "none", "--steps", "2", "--out", str(tmp_path))
    assert report["latents"] == {} and "EDM, sigma" in report["process"] and not report["wrong"]


def test_what_cannot_be_looked_at_is_said_in_one_sentence(tiny_sd, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(dump(toy(tmp_path / "run")))
    cases = {
        (str(tmp_path / "none"),): "does not exist",
        (str(tiny_sd), "run.steps=2"): "only family.* can be set",
        (str(tiny_sd), "--methods", "dmd7"): "'dmd7' is no method",
        (str(tiny_sd), "--images", str(tmp_path / "none")): "does not exist",
    }
    for arguments, sentence in cases.items():
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert said(capsys, str(recipe), *QUIET)["family"] == "toy"
