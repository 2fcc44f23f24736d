"""Training that must reach a known answer: the exact mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from learning import learner, small

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


def test_dmd2s_gradient_is_what_closes_the_gap():
    """Without the student's loss nothing moves."""
    settings = {"normalise": False, "guidance_scale": 1.0, "time_density": "lognormal", "time_mean": -0.5}
    family = small()
    still = learner("dmd2", family, student_every=1, pull=0.0, **settings)
    start = still.distance()
    assert still.run(20).distance() == pytest.approx(start, rel=1e-6)
    assert learner("dmd2", family, student_every=1, **settings).run(300).distance() < start / 2.5
