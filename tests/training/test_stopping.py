"""A run that stops when its metric does, and two runs broken on purpose, which are told so while they run."""

from __future__ import annotations

import math
import re

import pytest
import torch
import worlds
from runs import metrics, toy

from evaluation.values import Value
from stepdistill.errors import UserError
from stepdistill.methods import METHODS
from stepdistill.methods.base import COMMON_HEALTH
from stepdistill.registry import allowing_code, resolve
from training import monitor, seeds
from training import run as running
from training.checkpoint import RunDirectory
from training.patience import Patience, recorded
from training.sections import OptimConfig, RunConfig, StudentConfig, field_names

pytestmark = pytest.mark.usefixtures("short_runs")


def waited(values, lower=True, allowed=2):
    patience = Patience(allowed)
    for value in values:
        patience.see(*(value if isinstance(value, tuple) else (value, None)), lower)
    return patience.waited


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 2.0, 1.0], 0),
        ([1.0, 2.0, 1.5], 2),
        # Gains within both errors together are none; what they add up to is one.
        ([(3.0, 0.3), (2.9, 0.3), (2.8, 0.3)], 2),
        ([(3.0, 0.3), (2.8, 0.3), (2.5, 0.3)], 0),
        ([1.0, math.nan, None], 2),
        ([math.nan, 5.0], 0),
    ],
)
def test_only_a_gain_beyond_the_standard_errors_is_one(values, expected):
    assert waited(values) == expected
    flipped = [(-v[0], v[1]) if isinstance(v, tuple) else v if v is None else -v for v in values]
    assert waited(flipped, lower=False) == expected
    assert Patience(2).over is False and Patience(0).over is False


def test_a_run_stops_and_goes_on_to_stop_at_the_same_place(tmp_path, monkeypatch):
    values = {1: 3.0, 2: 2.0, 3: 1.99, 4: 1.98, 5: 0.1}

    def measured(run, family, sampler, *rest):
        return Value("sw1", values[sampler.card.step] if not rest else 0.0, 0.1, "lower")

    monkeypatch.setattr(monitor, "measure", measured)
    settings = ("run.metric=sw1", "run.metric_every=1", "run.stop=patience", "run.patience=2", "run.steps=6")
    running.run(toy(tmp_path / "whole", *settings))
    directory = RunDirectory(tmp_path / "whole")
    rows = recorded(directory.checkpoints / "measured.json")
    assert directory.latest() == 4 and [value for _, value, *_ in rows] == [3.0, 2.0, 1.99, 1.98]
    # The same command has nothing left to do; begun and gone on with, it ends at the same step.
    running.run(toy(tmp_path / "whole", *settings))
    assert directory.latest() == 4
    running.run(toy(tmp_path / "parts", *settings, "run.steps=3"))
    running.run(toy(tmp_path / "parts", *settings))
    assert RunDirectory(tmp_path / "parts").latest() == 4
    assert [row["step"] for row in metrics(tmp_path / "whole") if "student/total" in row][-1] <= 4


def test_patience_without_a_metric_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.stop must be steps where metric_every is 0"):
        toy(tmp_path, "run.stop=patience")


BROKEN = {
    # No teacher and no fake score hold what a reward pulls at.
    "collapse": {
        "method": {"name": "reward", "reward": "worlds:Towards", "margin": 100.0},
        "optim": {"lr": 2e-2, "batch_size": 32, "optimizer": "adam"},
    },
    # What guides has no fixed point: its dose is augmentation times rate times updates.
    "saturation": {
        "method": {
            "name": "decoupled_dmd", "student_every": 1, "augmentation": 60.0, "guidance_scale": 1.0, "critic_pull": 0.0,
        },
        "optim": {"lr": 1e-2, "batch_size": 32, "optimizer": "adam"},
    },
}  # fmt: skip


@pytest.mark.parametrize(("word", "name"), [("collapse", "seed_spread"), ("saturation", "std_ratio")])
def test_a_broken_run_is_told_while_it_goes_on(word, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seeds, "TEACHER_STEPS", 12)
    family = {"name": "toy", "classes": 2, "fit_steps": 150}
    student = {"steps": [1], "ema": 0.0}
    run = {"steps": 60, "metric_every": 20, "metric": "sw1", "log_every": 30}
    with allowing_code():
        recipe = toy(tmp_path / "run", family=family, student=student, run=run, **BROKEN[word])
        running.run(recipe)
    said = capsys.readouterr().err
    (warning,) = re.findall(rf"step (\d+): .*samples/{name} = .*{word}", said)
    assert int(warning) < 60
    seen = [row[f"samples/{name}"] for row in metrics(tmp_path / "run") if f"samples/{name}" in row]
    assert len(seen) == 3 and (seen[-1] < 0.6 if word == "collapse" else seen[-1] > 1.25)


def test_what_trains_a_teacher_is_not_measured_by_the_one_it_replaces(tmp_path):
    run = {"steps": 2, "metric_every": 1, "metric": "sw1", "log_every": 1}
    recipe = toy(
        tmp_path / "run", family={"name": "toy", "fit_steps": 1}, run=run, method={"name": "pretrain"}
    )
    running.run(recipe)
    assert not any(name.startswith("samples/") for row in metrics(tmp_path / "run") for name in row)


def test_the_spread_of_seeds_is_within_prompts():
    x0 = torch.tensor([[[0.0], [2.0]], [[10.0], [14.0]]])
    assert seeds.seed_spread(x0) == pytest.approx(3)


def test_every_warning_names_a_setting_that_there_is():
    sections = {"optim": OptimConfig, "run": RunConfig, "student": StudentConfig}
    kept = {name: set(field_names(cls)) for name, cls in sections.items()}
    every = set()
    for name in METHODS:
        every |= {key for key in vars(resolve(name, METHODS, "method").Config) if not key.startswith("_")}
        every |= set(resolve(name, METHODS, "method").Config.__dataclass_fields__)
    causes = [cause for _, _, cause in COMMON_HEALTH.values()]
    for name in METHODS:
        method = worlds.method(name, **worlds.SETTINGS.get(name, {}))
        causes += [cause for _, _, cause in method.health.values()]
    for cause in set(causes):
        named = re.findall(r"\b(method|optim|run|student)\.([a-z_0-9]+)", cause)
        assert named, cause
        for section, field in named:
            known = every if section == "method" else kept[section]
            assert field in known | {"student", "fake_score", "discriminator", "networks"}, (cause, field)
