"""The forecast of a run's memory: counted as a real step counts, nothing computed, nothing changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import LCM, sd, toy
from torch import nn

from stepdistill.errors import UserError
from training.forecast import Forecast, forecast
from training.ledger import META, Ledger, without_content
from training.recipe import recipe_from
from training.run import build

MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.json"


class Layers(nn.Module):
    """Convolution, normalisation, attention, linear layers: what networks here are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.inside, self.leave = nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = nn.functional.silu(self.norm(self.enter(x))).flatten(2).transpose(1, 2)
        q, k, v = (each.unflatten(-1, (2, 16)).transpose(1, 2) for each in self.inside(tokens).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.leave(seen.transpose(1, 2).flatten(2))


def step(network: nn.Module, device: torch.device) -> Ledger:
    x = torch.zeros(8, 4, 16, 16, device=device)
    with Ledger({"network": network}, device) as ledger:
        network(x).square().mean().backward()
    network.zero_grad()
    return ledger


def test_tensors_without_content_are_counted_as_those_with():
    network = Layers()
    real, counted = step(network, torch.device("cpu")), step(without_content(network), META)
    assert real.peak.total() > 2 << 20
    assert counted.peak.total() == pytest.approx(real.peak.total(), rel=0.03)
    assert counted.peak["network"] == pytest.approx(real.peak["network"], rel=0.03)
    assert counted.live.total() == 0


def said(recipe) -> Forecast:
    family, sources = build(recipe)
    before = {name: value.clone() for name, value in family.teacher.state_dict().items()}
    found = forecast(recipe.stages()[0], family, sources[0])
    # The family is as it was.
    after = family.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.device.type for module in family.modules().values() for p in module.parameters()} <= {"cpu"}
    assert found.unknown == "" and found.peak == max(found.phases.values())
    return found


def test_weights_gradients_moments_and_the_average_are_those_of_what_is_trained(tmp_path, tiny_sd):
    found = said(sd(tmp_path, tiny_sd))
    student, critic, teacher = (found.networks[name] for name in ("student", "fake_score", "teacher"))
    size = 4 * student.parameters
    assert student.trained == student.parameters == teacher.parameters and teacher.trained == 0
    lasting = (student.weights, student.optimizer, student.average)
    assert student.gradients == size and lasting == (size, 2 * size, size)
    assert (critic.gradients, critic.average) == (size, 0)
    assert (teacher.weights, teacher.gradients, teacher.optimizer) == (size, 0, 0)
    assert set(found.phases) == {"student", "critic"} and student.activations > teacher.activations
    assert found.lasting == sum(n.weights + n.optimizer + n.average for n in found.networks.values()) + sum(
        found.helpers.values()
    )


@pytest.mark.slow
def test_what_saves_memory_is_forecast_to(tmp_path, tiny_sd):
    def activations(*overrides: str, **sections) -> int:
        found = said(sd(tmp_path, tiny_sd, "optim.batch_size=16", *overrides, **sections))
        return found.peak - found.lasting - found.networks["student"].gradients

    plain = activations(method=LCM)
    assert activations("optim.micro_batch_size=8", method=LCM) < 0.65 * plain
    assert activations("student.gradient_checkpointing=true", method=LCM) < 0.8 * plain
    assert activations("run.precision=bf16", method=LCM) < 0.9 * plain
    adapters = said(sd(tmp_path, tiny_sd, "student.lora.rank=2"))
    teacher = adapters.networks["teacher"].weights
    assert adapters.networks["student"].weights < 0.3 * teacher
    # They leave merged into a copy of it.
    assert adapters.phases["export"] == adapters.lasting + teacher


def test_text_encoders_that_leave_memory_are_not_counted(tmp_path, tiny_sd):
    kept, gone = (said(sd(tmp_path, tiny_sd, f"run.precompute={how}")) for how in ("never", "always"))
    assert set(kept.helpers) - set(gone.helpers) == {"text_encoder"} and "decoder" in gone.helpers


def test_a_step_that_cannot_be_counted_is_said_so(tmp_path, monkeypatch):
    def refuse(*given):
        raise ValueError("reads what is there")

    recipe = toy(tmp_path)
    monkeypatch.setattr("training.forecast._count", refuse)
    family, sources = build(recipe)
    found = forecast(recipe, family, sources[0])
    assert found.phases == {} and found.peak == found.lasting
    assert (
        "before activations (a step could not be counted: ValueError: reads what is there)"
        in found.lines()[-1]
    )


def test_what_a_run_refuses_its_forecast_refuses(tmp_path):
    """One real sample, which `rdm` compares with nothing."""
    method = {"name": "rdm", "distance": "mmd", "encoders": [{"name": "fourier"}]}
    mapping = toy(tmp_path).mapping() | {"method": method, "student": {"steps": [1]}}
    recipe = recipe_from(mapping | {"optim": {"batch_size": 1}})
    family, sources = build(recipe)
    with pytest.raises(UserError, match=r"set optim\.micro_batch_size to at least 2"):
        forecast(recipe, family, sources[0])


def test_the_published_forecasts_are_within_fifteen_percent():
    cases = json.loads(MEMORY.read_text())["cases"]
    assert len(cases) >= 3 and all(0.85 < case["ratio"] < 1.15 for case in cases.values())
