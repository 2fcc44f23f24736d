"""The health panel: a range that is left is said once, with its likely cause, in the log and in previews."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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
from stepdistill.methods.ranges import SCORES
from stepdistill.registry import resolve
from training import run as running
from training.health import COMMON, RECENT, Health
from training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("short_runs")

ROOT = Path(__file__).resolve().parents[2]


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
    assert {"student/dmd2/scores_cosine_recent", "dmd2/critic/accuracy"} <= made.method.health.keys()


def test_a_composition_is_judged_part_by_part():
    health = watched()
    logged = {"x0_mean": 0.0, "x0_std": 0.1, "teacher_x0_mean": 0.0, "teacher_x0_std": 1.0}
    derived, (said,) = health.check({f"student/scm/{key}": value for key, value in logged.items()})
    assert derived["student/scm/x0_std_ratio"] == pytest.approx(0.1)
    assert said.startswith("student/scm/x0_std_ratio = 0.1") and "collapse" in said
    assert any(line.startswith("! student/scm/x0_std_ratio 0.1") for line in health.lines())


# Logged every twenty iterations: (cosine, size apart) of the two scores. As Phased DMD begins on the embedded teacher, the
# roughest start of all that end well, and as it ends on the toy, where both scores are nearly one.
BEGINS = [(0.89, 0.47), (0.47, 0.86), (0.5, 0.86), (0.67, 0.73), (0.73, 0.67), (0.77, 0.63), (0.78, 0.62), (0.77, 0.63),
          (0.73, 0.67), (0.79, 0.6), (0.81, 0.58)]  # fmt: skip
ENDS = [(0.986, 0.13), (0.986, 0.13), (0.984, 0.13), (0.983, 0.14), (0.984, 0.14), (0.983, 0.14), (0.981, 0.15), (0.981, 0.15),
        (0.982, 0.14), (0.983, 0.14)]  # fmt: skip
# A collapse of f-distill's student, through which the critic's loss rose by half.
COLLAPSES = [(0.82, 0.56), (0.81, 0.57), (0.53, 0.8), (0.29, 0.96), (0.34, 0.93), (0.27, 0.95), (0.3, 0.94), (0.3, 0.94),
             (0.35, 0.92), (0.29, 0.94), (0.35, 0.92)]  # fmt: skip
# DMD2 on the toy with optim.fake_score.lr of 1e-6, and of 2e-2. The critic's loss fell to a fifth, and to a tenth.
FROZEN = [(0.988, 0.13), (0.992, 0.11), (0.995, 0.08), (0.991, 0.11), (0.994, 0.08), (0.997, 0.06), (0.996, 0.07), (0.996, 0.08),
          (0.996, 0.07), (0.996, 0.08)]  # fmt: skip
DIVERGES = [(0.68, 0.93), (0.7, 0.9), (0.69, 0.92), (0.72, 0.81), (0.71, 0.86), (0.07, 330.0), (0.18, 3.6), (0.19, 2.8),
            (0.24, 1.8), (0.2, 2.3), (0.27, 1.7)]  # fmt: skip
OUTRUN, LAGS = (
    "below, the student has outrun its fake score: lower optim.student.lr",
    "raise optim.fake_score.lr",
)


def logged(cosine: float, apart: float, part: str = "") -> dict[str, float]:
    values = {"scores_cosine": cosine, "scores_apart": apart, "gap": 0.1}
    return {f"student/{part}{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (BEGINS, []),
        (ENDS, []),
        (COLLAPSES, [("scores_cosine", OUTRUN)]),
        (FROZEN, [("scores_cosine", LAGS)]),
        (DIVERGES, [("scores_cosine", OUTRUN), ("scores_apart", "has diverged: lower optim.fake_score.lr")]),
    ],
    ids=["begins", "ends", "collapses", "frozen", "diverges"],
)
@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        *((name, {}, "") for name in ("dmd2", "phased_dmd", "sid", "vsd", "cdm", "disback")),
        ("compose", {"parts": [{"name": "cd"}, {"name": "dmd2"}], "sampling": "first"}, "dmd2/"),
    ],
)
def test_a_fake_score_that_lags_or_diverges_is_told_with_the_setting_to_change(
    name, settings, part, lines, told
):
    health = Health(worlds.method(name, **settings), log_every=20)
    said = [warning for line in lines for warning in health.check(logged(*line, part))[1]]
    assert len(said) == len(told)
    for warning, (value, cure) in zip(said, told, strict=True):
        assert warning.startswith(f"student/{part}{value}_recent = ") and cure in warning
    if lines is FROZEN:
        assert health.panel[f"student/{part}scores_cosine_recent"] > 0.99


def test_a_critics_loss_tells_nothing_of_it():
    """It was the warning once: it falls where the fake score is frozen, and where one comes back from far away."""
    health = Health(worlds.method("dmd2"), log_every=20)
    for loss in (1.0, 0.2, 3.0, 66000.0):
        derived, said = health.check({"critic/denoising": loss, "critic/total": loss})
        assert derived == {} and said == []


@pytest.mark.parametrize("log_every", [10, 50, 300])
def test_a_recent_mean_is_of_the_last_iterations_and_not_of_fewer(log_every):
    health, window = Health(worlds.method("dmd2"), log_every), max(RECENT // log_every, 1)
    cosines = [0.7 + 0.01 * i for i in range(window + 2)]
    for i, cosine in enumerate(cosines):
        derived = health.check(logged(cosine, 0.5))[0]
        recent = cosines[max(i + 1 - window, 0) : i + 1]
        assert ("student/scores_cosine_recent" in derived) == (len(recent) == window)
        if len(recent) == window:
            assert derived["student/scores_cosine_recent"] == pytest.approx(sum(recent) / window)
            assert derived["student/scores_apart_recent"] == pytest.approx(0.5)


def test_a_fake_score_may_begin_as_the_teacher_but_not_stay_it():
    health = Health(worlds.method("dmd2"), log_every=20)
    begun = [said for _ in range(9) for said in health.check(logged(1.0, 0.0))[1]]
    (said,) = health.check(logged(1.0, 0.0))[1]
    assert begun == [] and LAGS in said
    health = Health(worlds.method("dmd2"), log_every=20)
    assert not [said for line in [(1.0, 0.0), *BEGINS] for said in health.check(logged(*line))[1]]


def test_a_run_that_goes_on_remembers_what_its_means_are_of():
    whole, first = (Health(worlds.method("dmd2"), log_every=20) for _ in range(2))
    apart = [whole.check(logged(*line)) for line in COLLAPSES]
    before = [first.check(logged(*line)) for line in COLLAPSES[:6]]
    second = Health(worlds.method("dmd2"), log_every=20)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.check(logged(*line)) for line in COLLAPSES[6:]] == apart
    assert second.state_dict() == whole.state_dict()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("rate", "cure"),
    [
        ("optim.student.lr=1e-3", None),
        ("optim.fake_score.lr=1e-6", LAGS),
        ("optim.fake_score.lr=1e-1", "has diverged: lower optim.fake_score.lr"),
        ("optim.student.lr=3e-2", OUTRUN),
    ],
)
def test_a_run_broken_on_purpose_is_told_so(rate, cure, tmp_path, capsys):
    recipe = Path(__file__).parents[2] / "training" / "recipes" / "toy_dmd2.yaml"
    short = ["run.steps=240", "run.log_every=20", "run.preview_every=0", "optim.batch_size=256"]
    running.run(load_recipe(recipe, [*short, f"run.out={tmp_path / 'run'}", rate]))
    said = capsys.readouterr().err
    assert (cure in said) if cure else ("W06" not in said)


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
    derived, _ = Health(made.method, log_every=RECENT).check(dict.fromkeys(logged, 1.0))
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


def test_ranges_hold_what_was_measured_of_runs_that_ended_well():
    """benchmarks/health.json: each run of ten minutes on the embedded teacher, whatever its method."""
    measured = json.loads((ROOT / "benchmarks" / "health.json").read_text())
    healthy = {name: rows for name, rows in measured.items() if name.startswith("runs/fair/10/")}
    assert len(healthy) > 12
    for name, rows in healthy.items():
        for row in rows:
            assert row["said"] == [], name
            for value, (low, high, _) in resolve(row["method"], METHODS, "method").health.items():
                least, most = row.get(value, (low, high))
                assert low <= least <= most <= high, (name, value)
    (saturated,) = measured["scenes_decoupled_dmd?300?method.augmentation=15"]
    low, _, cure = resolve("decoupled_dmd", METHODS, "method").health["student/balance_recent"]
    assert saturated["student/balance_recent"][1] < low and "lower method.augmentation" in cure
    (collapsed,) = measured["runs/fair/120/f_distill/run"]
    assert collapsed["student/scores_cosine_recent"][0] < SCORES["student/scores_cosine_recent"][0]
    assert [said.split(":")[1].strip().split(" = ")[0] for said in collapsed["said"]] == [
        "student/scores_cosine_recent"
    ]
