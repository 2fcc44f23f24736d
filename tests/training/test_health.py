"""The health panel: a range that is left is said once, with its likely cause, in the log and in previews."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import worlds
from PIL import Image
from runs import toy
from worlds import EVERY, world

from stepdistill.methods import METHODS
from stepdistill.methods.base import Method
from stepdistill.methods.dmd2 import DMD2
from training import run as running
from training.health import COMMON, Health

pytestmark = pytest.mark.usefixtures("short_runs")


class Watched(Method):
    health = {"critic/denoising": (0.0, 1.0, "the fake score does not learn")}  # noqa: RUF012


def watched() -> Health:
    return Health(Watched(SimpleNamespace()))


def test_a_warning_comes_once_until_the_value_has_been_back():
    health = watched()
    assert health.check({"critic/denoising": 0.5})[1] == []
    (said,) = health.check({"critic/denoising": 3.0})[1]
    assert "critic/denoising = 3, normally 0 to 1: the fake score does not learn." in said
    assert health.check({"critic/denoising": 4.0})[1] == []
    assert health.check({"critic/denoising": 0.9})[1] == []
    assert len(health.check({"critic/denoising": 3.0})[1]) == 1
    assert len(watched().check({"critic/denoising": float("nan")})[1]) == 1


@pytest.mark.parametrize(
    ("mean", "std", "name", "cause"),
    [
        (0.0, 0.2, "x0_std_ratio", "collapse"),
        (0.9, 1.0, "x0_shift", "brightness drift"),
        (0.1, 1.1, None, ""),
    ],
)
def test_the_student_is_judged_beside_its_teacher(mean, std, name, cause):
    values = {"x0_mean": mean, "x0_std": std, "teacher_x0_mean": 0.1, "teacher_x0_std": 1.0}
    derived, said = watched().check({f"student/{key}": value for key, value in values.items()})
    assert derived["student/x0_std_ratio"] == pytest.approx(std)
    assert derived["student/x0_shift"] == pytest.approx(mean - 0.1)
    assert [name in line and cause in line for line in said] == ([True] if name else [])


def test_a_gradient_that_grows_is_divergence():
    health = watched()
    assert health.check({"student/grad_norm_student": 0.1})[1] == []
    (said,) = health.check({"student/grad_norm_student": 10.0})[1]
    assert "divergence" in said


# Has one with an anchor only.
REFERENCED = set(METHODS) - {"reward"}


@EVERY
def test_every_method_says_what_is_normal_and_logs_its_student_beside_a_reference(name, settings):
    made = worlds.method(name, **settings)
    said = f"{sys.modules[type(made).__module__].__doc__} {type(made).__doc__}"
    assert "normal ranges" in said.lower()
    made = world(made)
    for phase in made.method.phases(0):
        if phase.name == "student":
            losses = {}
            for _, loss in phase.terms:
                losses |= loss(made.nets, made.batch(0, phase.name))
            parts = {key.rpartition("x0_std")[0] for key in losses if key.endswith("x0_std")}
            parts = {key.removesuffix("teacher_") for key in parts}
            assert parts
            for part in parts:
                whose = {f"{part}x0_std", f"{part}x0_mean"}
                if name in REFERENCED and part.rstrip("/") in ("", *REFERENCED):
                    whose |= {f"{part}teacher_x0_std", f"{part}teacher_x0_mean"}
                assert whose <= losses.keys()


def test_a_composition_logs_its_parts_apart():
    made = world("compose", parts=[{"name": "cd"}, {"name": "dmd2"}], sampling="first")
    (student, *_) = made.method.phases(0)
    logged = [loss(made.nets, made.batch()).keys() for _, loss in student.terms]
    wanted = [{"total", f"{part}/x0_std", f"{part}/teacher_x0_std"} for part in ("cd", "dmd2")]
    assert all(names >= some for names, some in zip(logged, wanted, strict=True))
    assert not any("/" not in name for names in logged for name in names - {"total"})
    assert {"student/dmd2/gap", "dmd2/critic/denoising_growth"} <= made.method.health.keys()


def test_a_composition_is_judged_part_by_part():
    health = watched()
    logged = {"x0_mean": 0.0, "x0_std": 0.1, "teacher_x0_mean": 0.0, "teacher_x0_std": 1.0}
    derived, (said,) = health.check({f"student/scm/{key}": value for key, value in logged.items()})
    assert derived["student/scm/x0_std_ratio"] == pytest.approx(0.1)
    assert said.startswith("student/scm/x0_std_ratio = 0.1") and "collapse" in said
    assert any(line.startswith("! student/scm/x0_std_ratio 0.1") for line in health.lines())


def test_a_fake_score_that_falls_behind_is_named():
    health = Health(worlds.method("dmd2"))
    assert health.check({"critic/denoising": 0.4})[1] == []
    # As a run at a high rate begins.
    assert health.check({"critic/denoising": 0.8})[1] == []
    (said,) = health.check({"critic/denoising": 1.2})[1]
    assert "critic/denoising_growth = 3" in said and "fake-score lag" in said


@EVERY
def test_every_range_of_every_method_is_of_a_value_it_logs(name, settings):
    made = world(name, **settings)
    logged = set()
    for step in range(12):
        for phase in made.method.phases(step):
            batch = made.batch(step, phase.name)
            for _, loss in phase.terms:
                logged |= {f"{phase.name}/{key}" for key in loss(made.nets, batch)}
            logged |= {f"{phase.name}/grad_norm_{network}" for network in phase.trains}
    derived, _ = Health(made.method).check(dict.fromkeys(logged, 1.0))
    # With a GAN.
    optional = {key for key in made.method.health if key.endswith("critic/accuracy")}
    assert set(made.method.health) - set(COMMON) - optional <= logged | set(derived)
    assert all(low < high and cause for low, high, cause in made.method.health.values())


def test_the_run_warns_logs_and_draws_it(tmp_path, monkeypatch, capsys):
    never = {"critic/denoising": (1e6, 2e6, "a cause to be read")}
    monkeypatch.setattr(DMD2, "health", never)
    running.run(toy(tmp_path / "a", "run.preview_every=4"))
    assert capsys.readouterr().err.count("a cause to be read") == 1
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all("student/grad_norm_growth" in row for row in rows if "student/total" in row)
    first, later = (
        np.asarray(Image.open(tmp_path / "a" / "previews" / f"{step:07d}.png")) for step in (0, 4)
    )
    # Lines of text below the pictures.
    assert later.shape[0] > first.shape[0]
    red = (later[..., 0] > 200) & (later[..., 1] < 80) & (later[..., 2] < 80)
    assert red[first.shape[0] :].any()
