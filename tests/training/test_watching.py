"""Previews and metrics: they show what they say, keep the best checkpoint, and change nothing in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import checkpoint, labelled_images, metrics, pixel, same, sd, toy

import stepdistill
from evaluation.values import Value
from stepdistill.errors import UserError
from training import monitor, preview
from training import run as running
from training.checkpoint import RunDirectory
from training.measure import check_metric, measure

pytestmark = pytest.mark.usefixtures("short_runs")


def test_previews_show_student_teacher_and_fake_score(tmp_path, tiny_sd, monkeypatch):
    titles, original = [], preview.grid

    def grid(rows: list[tuple[str, np.ndarray]], notes: list[str]) -> Image.Image:
        titles.append([title for title, _ in rows])
        assert all(picture.shape == (16, 16 * 3, 3) for _, picture in rows)
        return original(rows, notes)

    monkeypatch.setattr(preview, "grid", grid)
    settings = ("run.steps=2", "run.preview_every=1", "run.preview_count=3")
    for name in ("one", "two"):
        running.run(sd(tmp_path / name, tiny_sd, *settings))
    expected = ["student, 1 step", "student, 2 steps", "teacher, 3 steps"]
    assert titles == [[*expected, "fake_score: x0 of the student's images at half the noise"]] * 6
    files = [sorted((tmp_path / name / "previews").iterdir()) for name in ("one", "two")]
    assert [path.name for path in files[0]] == ["0000000.png", "0000001.png", "0000002.png"]
    pictures = [[path.read_bytes() for path in part] for part in files]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == 3
    with Image.open(files[0][0]) as image:
        assert image.size == (48, 4 * (14 + 16))


def test_a_preview_changes_nothing_in_training(tmp_path, tiny_sd):
    running.run(sd(tmp_path / "without", tiny_sd, "run.steps=2"))
    running.run(sd(tmp_path / "with", tiny_sd, "run.steps=2", "run.preview_every=1", "run.preview_count=2"))
    assert same(checkpoint(tmp_path / "without").tensors, checkpoint(tmp_path / "with").tensors)


def test_the_metric_is_logged_and_its_best_checkpoint_kept(tmp_path, monkeypatch):
    real = monitor.measure
    values = []

    def measured(*args: Any) -> Value:
        value = real(*args)
        values.append(value.value)
        return value

    monkeypatch.setattr(monitor, "measure", measured)
    settings = ("run.metric=sw1", "run.metric_every=2", "run.keep=1", "optim.lr=1e-2")
    running.run(toy(tmp_path / "run", *settings))
    assert [line["metric/sw1"] for line in metrics(tmp_path / "run") if "metric/sw1" in line][:3] == values
    best = RunDirectory(tmp_path / "run").best()
    assert best == (2 * (1 + values.index(min(values))), min(values))
    assert set(RunDirectory(tmp_path / "run").steps()) == {best[0], 6}


@pytest.mark.parametrize(("better", "best"), [("higher", (2, 0.3)), ("lower", (1, 0.1))])
def test_the_best_checkpoint_is_the_best_by_what_the_value_says(better, best, tmp_path, tiny_sd, monkeypatch):
    values = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(monitor, "measure", lambda *args: Value("v", next(values), better=better))
    settings = ("run.metric=attributes/all", "run.metric_every=1", "run.steps=3", "run.keep=1")
    running.run(sd(tmp_path / "run", tiny_sd, *settings))
    directory = RunDirectory(tmp_path / "run")
    assert directory.best() == best and directory.steps() == [best[0], 3]


def test_more_modes_are_better_and_less_distance(tmp_path):
    recipe = toy(tmp_path / "run", "run.metric=modes")
    family, _ = running.build(recipe)
    assert {name: better for name, (_, better) in family.metrics.items()} == {
        "sw1": "lower",
        "modes": "higher",
        "shares": "lower",
        "trace": "lower",
        "shape": "lower",
    }


def test_attributes_are_measured_on_the_exported_student(tmp_path, tiny_sd):
    settings = ("run.metric=attributes/all", "run.metric_every=1", "run.steps=1", "run.metric_samples=3")
    running.run(sd(tmp_path / "run", tiny_sd, *settings))
    (value,) = (
        line["metric/attributes/all"] for line in metrics(tmp_path / "run") if "metric/attributes/all" in line
    )
    assert 0 <= value <= 1


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("prdc:scenes-v1/recall", "higher"),
        ("diversity:scenes-v1", "higher"),
        ("kid", "lower"),
        ("clip:scenes-v1", "higher"),
        ("fd:NET/infinity", "lower"),
    ],
)
def test_a_run_is_watched_by_any_metric_as_the_evaluation_measures_it(
    metric, better, tmp_path, tiny_sd, monkeypatch
):
    from evaluation import evaluate
    from evaluation import protocol as protocols
    from evaluation.feature_net import FeatureNet
    from evaluation.references import SceneReference

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    few = replace(protocols.PROTOCOLS["scenes-2k"], reference=SceneReference(n=20))
    monkeypatch.setitem(protocols.PROTOCOLS, "scenes-2k", few)
    torch.manual_seed(0)
    FeatureNet("tiny", 32, 16, {"label": ["a", "b"]}).save(tmp_path / "net")
    metric = metric.replace("NET", str(tmp_path / "net"))
    recipe = sd(
        tmp_path / "run", tiny_sd, f"run.metric={metric}", "run.metric_every=1", "run.metric_samples=12"
    )
    check_metric(recipe.run, running.build(recipe)[0])
    sampler = stepdistill.load(tiny_sd)
    found = measure(recipe.run, sampler.family_, sampler, steps=2)
    kind = metric.partition(":")[0]
    extractor = str(tmp_path / "net") if "net" in metric else None
    alone = evaluate(sampler.at(2, chunk=64), n=12, metrics=(kind,), extractor=extractor)
    assert (alone[found.name], found.better) == (found.value, better)
    assert found.name == metric.replace(str(tmp_path / "net"), "tiny") or metric == "kid"


def test_prompts_are_measured_against_ones_own_images_and_captions(tmp_path, tiny_sd):
    images, captions = labelled_images(tmp_path / "images"), tmp_path / "captions.txt"
    captions.write_text("a large red star on a black background\n" * 8)
    own = (f"run.metric_reference={images}", f"run.metric_captions={captions}", "run.metric=fd:scenes-v1")
    running.run(
        sd(tmp_path / "run", tiny_sd, "run.metric_every=1", "run.steps=1", "run.metric_samples=8", *own)
    )
    step, value = RunDirectory(tmp_path / "run").best()
    assert step == 1 and value > 0
    with pytest.raises(UserError, match="has captions for 8 samples"):
        running.run(sd(tmp_path / "more", tiny_sd, "run.metric_every=1", "run.metric_samples=9", *own))


def test_classes_are_measured_against_a_reference(tmp_path, tiny_pixel):
    images = labelled_images(tmp_path / "images")
    settings = ("run.metric_every=2", "run.metric_samples=6")
    with pytest.raises(UserError, match=r"run\.metric=fd:scenes-v1 needs run\.metric_reference here"):
        running.run(pixel(tmp_path / "run", tiny_pixel, images, *settings))
    running.run(pixel(tmp_path / "run", tiny_pixel, images, *settings, f"run.metric_reference={images}"))
    (value,) = (
        v for line in metrics(tmp_path / "run") for k, v in line.items() if k == "metric/fd:scenes-v1"
    )
    assert value > 0 and math.isfinite(value)
    assert stepdistill.load(tmp_path / "run" / "student").class_names is not None


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        ("fdd:scenes-v1", "", "run.metric=fdd:scenes-v1 cannot be measured on the family 'sd'"),
        ("attributes/colors", "", "did you mean attributes/colours?"),
        ("prdc:scenes-v1/recal", "", "cannot be measured on the family 'sd'"),
        ("latency", "", "cannot be measured on the family 'sd'"),
        ("paired/distance", "", "cannot be measured on the family 'sd'"),
        # No teacher is measured in a run.
        ("diversity/of_teacher", "", "cannot be measured on the family 'sd'"),
        ("fd_ratio", "", "cannot be measured on the family 'sd'; choose one of fd,"),
        ("kid:scenes-v1/subset_size", "", "cannot be measured on the family 'sd'"),
        ("attributes:scenes-v1", "", "cannot be measured on the family 'sd'"),
        ("fd:scene-v1", "", "there is no extractor 'scene-v1'"),
        ("fd:scenes-v1", "images", "run.metric_reference=images needs run.metric_captions with it"),
    ],
)
def test_a_wrong_metric_is_found_before_training(metric, reference, message, tmp_path, tiny_sd):
    settings = (f"run.metric={metric}", "run.metric_every=1", f"run.metric_reference='{reference}'")
    with pytest.raises(UserError) as error:
        running.run(sd(tmp_path / "run", tiny_sd, *settings))
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_the_toy_has_its_own_metric(tmp_path):
    recipe = toy(tmp_path / "run", "run.metric_every=1")
    family, _ = running.build(toy(tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"on the family 'toy'; choose one of sw1, modes, shares, trace, shape\."
    ):
        check_metric(recipe.run, family)
