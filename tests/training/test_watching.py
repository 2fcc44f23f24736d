"""Previews and metrics: they show what they say, keep the best checkpoint, and change nothing in training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import checkpoint, labelled_images, metrics, pixel, same, sd, toy

import stepdistill
from stepdistill.errors import UserError
from training import monitor, preview
from training import run as running
from training.checkpoint import RunDirectory
from training.measure import check_metric, lower_is_better

pytestmark = pytest.mark.usefixtures("short_runs")


def test_previews_show_student_teacher_and_fake_score(tmp_path, tiny_sd, monkeypatch):
    titles, original = [], preview.grid

    def grid(rows: list[tuple[str, np.ndarray]], notes: list[str]) -> Image.Image:
        titles.append([title for title, _ in rows])
        assert all(picture.shape == (16, 16 * 3, 3) for _, picture in rows)
        return original(rows, notes)

    monkeypatch.setattr(preview, "grid", grid)
    monkeypatch.setattr(preview, "TEACHER_STEPS", 3)
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

    def measured(*args: Any) -> float:
        values.append(real(*args))
        return values[-1]

    monkeypatch.setattr(monitor, "measure", measured)
    settings = ("run.metric=sw1", "run.metric_every=2", "run.keep=1", "optim.lr=1e-2")
    running.run(toy(tmp_path / "run", *settings))
    assert [line["metric/sw1"] for line in metrics(tmp_path / "run") if "metric/sw1" in line][:3] == values
    best = RunDirectory(tmp_path / "run").best()
    assert best == (2 * (1 + values.index(min(values))), min(values))
    assert set(RunDirectory(tmp_path / "run").steps()) == {best[0], 6}


def test_scores_rise_and_distances_fall(tmp_path, tiny_sd, monkeypatch):
    values = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(monitor, "measure", lambda *args: next(values))
    running.run(
        sd(
            tmp_path / "run",
            tiny_sd,
            "run.metric=attributes/all",
            "run.metric_every=1",
            "run.steps=3",
            "run.keep=1",
        )
    )
    assert RunDirectory(tmp_path / "run").best() == (2, 0.3) and RunDirectory(tmp_path / "run").steps() == [
        2,
        3,
    ]
    directions = {"fd:scenes-v1": True, "sw1": True, "clip:scenes-v1": False, "attributes/all": False}
    assert {name: lower_is_better(name) for name in directions} == directions


def test_attributes_are_measured_on_the_exported_student(tmp_path, tiny_sd):
    settings = ("run.metric=attributes/all", "run.metric_every=1", "run.steps=1", "run.metric_samples=3")
    running.run(sd(tmp_path / "run", tiny_sd, *settings))
    (value,) = (
        line["metric/attributes/all"] for line in metrics(tmp_path / "run") if "metric/attributes/all" in line
    )
    assert 0 <= value <= 1


def test_the_evaluation_is_asked_for_the_metric_by_name(tmp_path, tiny_sd, monkeypatch):
    asked = {}

    def evaluate(draw: Any, **settings: Any) -> dict[str, float]:
        asked.update(settings, images=draw(["a large red star on a black background"], [0]))
        return {"fd:scenes-v1": 12.5, "fd:scenes-v1/se": 1.0}

    monkeypatch.setattr("evaluation.evaluate", evaluate)
    running.run(sd(tmp_path / "run", tiny_sd, "run.metric_every=1", "run.steps=1", "run.metric_samples=7"))
    assert (asked["n"], asked["metrics"], asked["extractor"]) == (7, ("fd",), "scenes-v1")
    assert asked["reference"] is None and asked["images"].shape == (1, 3, 16, 16)
    assert RunDirectory(tmp_path / "run").best() == (1, 12.5)


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
        ("clip", "", "did you mean clip:scenes-v1?"),
        ("attributes/colors", "", "did you mean attributes/colours?"),
        ("latency", "", "choose one of fd:scenes-v1, clip:scenes-v1, attributes/all"),
        ("fd:scene-v1", "", "there is no extractor 'scene-v1'"),
        ("fd:scenes-v1", "images", "run.metric_reference=images is for families without prompts"),
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
    with pytest.raises(UserError, match=r"on the family 'toy'; choose one of sw1, modes\."):
        check_metric(recipe.run, family)
