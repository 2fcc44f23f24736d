"""Training that must reach a known answer: the exact mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import worlds

from stepdistill.families.toy import Toy
from stepdistill.methods.base import Batch, Networks
from stepdistill.noise import SampleNoise

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("recipe", "bound"), [("toy_dmd2", 2.0), ("toy_lcm", 3.0)])
def test_the_shipped_recipe_reaches_the_data(recipe, bound, tmp_path):
    from training.recipe import load_recipe
    from training.run import run

    out = tmp_path / recipe
    run(load_recipe(RECIPES / f"{recipe}.yaml", [f"run.out={out}", "run.preview_every=0"]))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reached = [row["metric/sw1"] for row in rows if "metric/sw1" in row]
    assert reached and reached[-1] <= bound


@pytest.fixture(scope="module")
def family() -> Toy:
    made = Toy(Toy.Config(modes=4, std=0.2, schedule="flow", fit_steps=100))
    made.teacher.width = 32
    return made


def distance_after(family: Toy, steps: int, pull: float) -> float:
    """Sliced W1 over its floor after a short one-step DMD2 run; `pull` multiplies the student's loss."""
    settings = {"normalise": False, "guidance_scale": 1.0, "time_density": "lognormal", "time_mean": -0.5}
    method = worlds.method("dmd2", steps=(1,), student_every=1, **settings)
    student = family.student("teacher", ())
    nets = Networks(
        {"student": student, "teacher": family.teacher} | method.networks(family.teacher, student),
        family.schedule,
    )
    trained = {name: nets.modules[name] for name in ("student", "fake_score")}
    optimizers = {
        name: torch.optim.Adam(net.parameters(), 2e-3, betas=(0.0, 0.99)) for name, net in trained.items()
    }
    for step in range(steps):
        for phase in method.phases(step):
            for name, net in trained.items():
                net.requires_grad_(name in phase.trains)
            noise = SampleNoise(range(64), step=step, phase=phase.name)
            batch = Batch(None, None, family.shape, noise.index, noise)
            for weight, loss in phase.terms:
                factor = pull if phase.name == "student" else 1.0
                (factor * weight * loss(nets, batch)["total"].mean()).backward()
            for name in phase.trains:
                optimizers[name].step()
                optimizers[name].zero_grad()

    @torch.no_grad()
    def draw(count: int) -> torch.Tensor:
        z = SampleNoise(range(count), phase="draw").randn(2)
        x = family.schedule.first_state(z, family.schedule.t_max)
        return student(x, torch.full((count,), family.schedule.t_max, dtype=torch.float64)).x0

    return family.sliced_w1(draw, 1024)


def test_dmd2_closes_the_gap_and_its_gradient_is_what_does_it(family):
    start = distance_after(family, 0, 1.0)
    assert distance_after(family, 20, 0.0) == pytest.approx(start, rel=1e-6)
    assert distance_after(family, 300, 1.0) < start / 2.5
