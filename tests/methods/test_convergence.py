"""Every method brings its student to the exact mixture, or to what it is for: short trainings of a narrow network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learning import Learner, learner, small

from stepdistill.families.toy import Toy
from stepdistill.methods import METHODS

LOGNORMAL = {"time_density": "lognormal", "time_mean": -0.5}
MATCHING = {"student_every": 1, "guidance_scale": 1.0, "normalise": False, **LOGNORMAL}
GAME = {"gan": "relativistic", "r1": "exact", "r1_weight": 0.02, "r2": True}
FEATURES = GAME | {"r1_weight": 1.0}
MAP = {"equal_share": 0.25, "time_mean": 0.0, "time_std": 1.4, "end_mean": -3.0}
# Of each method: iterations, by what the distance must fall at least, and settings. Students take one step but where
# "steps" says otherwise.
CASES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "dmd2": (150, 2.0, MATCHING),
    "dmd": (150, 2.0, MATCHING | {"student_every": 1, "pair_count": 1, "pair_steps": 20}),
    "vsd": (250, 1.2, {"guidance_scale": 1.0, "fake_guidance_scale": 1.0, "first_rho": 1.0, **LOGNORMAL}),
    "diff_instruct": (250, 1.5, {"time_mean": -0.5}),
    "f_distill": (150, 2.0, MATCHING | {"gan_critic_weight": 0.1}),
    "sim": (200, 1.5, {"huber_c": 0.3, "critic_density": "same", **LOGNORMAL}),
    "sid": (200, 1.25, {"normalise": False, "critic_density": "same", **LOGNORMAL}),
    "sida": (250, 1.25, {"normalise": False, "critic_density": "same", "gan_weight": 1e-2, **LOGNORMAL}),
    "decoupled_dmd": (150, 2.0, {"student_every": 1, "floor": 10.0, **LOGNORMAL}),
    # Of longer grids the fake score knows the mixture of all places alone, and they share the modes out.
    "cdm": (200, 2.0, {"student_every": 1, "floor": 10.0, "most_steps": 1, **LOGNORMAL}),
    "disback": (150, 2.0, {"path": 1, "base": {"name": "dmd2", **MATCHING}}),
    "kd": (200, 2.0, {"pair_count": 1, "pair_steps": 20}),
    "cd": (250, 1.5, {"points": 18}),
    "lcm": (250, 1.5, {"guidance_low": 1.0, "guidance_high": 1.0, "ddim_steps": 20}),
    "ect": (250, 1.5, {"double_every": 40, "stages": 6}),
    "tscd": (250, 1.5, {"segments": 1, "guidance_scale": 1.0, "ddim_steps": 20, "link_weight": "uniform"}),
    "scm": (250, 1.5, {"warmup": 50, "normalise": False, "prior": False, "learned_weight": False}),
    "meanflow": (250, 1.5, {"equal_share": 0.25, "end_mean": -3.0, "weight_power": 0.5}),
    "imf": (250, 1.5, {"guidance_high": 1.0, "tell_guidance": False, **MAP, "weight_power": 0.0}),
    "dmf": (250, 1.5, {"guidance_low": 1.0, "guidance_high": 1.0, **MAP}),
    "anyflow": (150, 2.0, MATCHING | {"flow_map_weight": 0.1}),
    "phased_dmd": (200, 1.5, MATCHING | {"steps": 2}),
    "twinflow": (300, 1.5, {"guidance_high": 1.0, "tell_guidance": False, **MAP, "weight_power": 0.0}),
    "rdm": (150, 2.0, {"encoders": [{"name": "fourier"}], "chunks": 2}),
    "boot": (250, 1.5, {"delta": 0.08}),
    "progressive": (150, 1.2, {"predecessor": "teacher", "steps": 2}),
    "lightning": (150, 1.2, {"predecessor": "teacher", "mse_weight": 1.0, "steps": 2, **GAME}),
    "ladd": (200, 1.5, {"warmup": 0, "time_mean": -1.0, "heads": "mean", **GAME}),
    "add": (
        1000,
        1.5,
        {"eye": "fourier", "distillation_weight": 0.02, "heads": "mean", "first_rho": 0.0, **FEATURES},
    ),
    "compose": (150, 2.0, {"parts": [{"name": "dmd2", **MATCHING}, {"name": "cd", "points": 18}]}),
}
# Proved below by what they are for.
OTHERS = {"pretrain", "tsm", "reward"}


@pytest.fixture(scope="module")
def families() -> dict[str, Toy]:
    return {name: small(name) for name in ("flow", "vp")}


def test_every_method_has_its_proof():
    assert set(METHODS) == CASES.keys() | OTHERS


# Of each kind one that costs a second; the others are slow.
FAST = ("kd", "cd", "diff_instruct")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_distance_to_the_data_falls(name, families):
    iterations, factor, settings = CASES[name]
    settings = dict(settings)
    steps = settings.pop("steps", 1)
    made = learner(name, families["flow"], steps, **settings)
    before = made.distance(steps)
    after = made.run(iterations).distance(steps)
    print(name, before, after)
    assert after < before / factor


def error(made: Learner) -> float:
    """Mean square of the student's x0 off the exact one."""
    family = made.family
    x0 = family.data(range(512), seed=5)
    t = family.schedule.t_of_rho(torch.linspace(-2, 2, 512, dtype=torch.float64).exp())
    x_t = family.schedule.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), t)
    with torch.no_grad():
        return float((made.nets.student(x_t, t).x0 - family.teacher(x_t, t).x0).square().mean())


@pytest.mark.parametrize(("name", "factor"), [("pretrain", 2), ("tsm", 5)])
def test_a_network_of_random_weights_learns_the_exact_answers(name, factor, families):
    """Further from data than from the teacher, whose answers have no noise."""
    made = learner(name, families["flow"], init="random", time_density="lognormal", time_mean=0.0)
    before = error(made)
    assert error(made.run(300)) < before / factor


def test_a_reward_pulls_the_samples_up_to_its_margin(families):
    made = learner("reward", families["flow"], reward="worlds:Towards", margin=-1.0)
    target = torch.tensor([2.0, 0.0])

    def score() -> torch.Tensor:
        return -(made.draw(512, 1) - target).square().sum(1)

    before = score()
    after = score() if made.run(60) else None
    assert float((before < -1).float().mean()) > 0.5 > 0.3 > float((after < -1).float().mean())
