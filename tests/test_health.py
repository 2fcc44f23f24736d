"""The health panel: a range that is left is said once, with its likely cause, in the log and in previews."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from test_methods import EVERY, make, world
from test_trainer import toy

from stepdistill.methods.base import Method
from stepdistill.methods.dmd2 import DMD2
from training import run as running
from training.health import COMMON, Health

pytestmark = pytest.mark.usefixtures("accelerator_state")


class Watched(Method):
    health = {"critic/denoising": (0.0, 1.0, "the fake score does not learn")}  # noqa: RUF012


def watched() -> Health:
    return Health(Watched(None))


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


@EVERY
def test_every_range_of_every_method_is_of_a_value_it_logs(name, settings):
    made = world(make(name, settings))
    logged = set()
    for step in range(12):
        for phase in made.method.phases(step):
            batch = made.batch(step, phase.name)
            for _, loss in phase.terms:
                logged |= {f"{phase.name}/{key}" for key in loss(made.nets, batch)}
            logged |= {f"{phase.name}/grad_norm_{network}" for network in phase.trains}
    assert set(made.method.health) - set(COMMON) <= logged
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
    assert later.shape[0] > first.shape[0]  # lines of text below the pictures
    red = (later[..., 0] > 200) & (later[..., 1] < 80) & (later[..., 2] < 80)
    assert red[first.shape[0] :].any()
