"""Methods spoken to at equal noise levels, whatever the schedule: networks, times and batches in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from worlds import COUNT, STEPS, Doubles

from stepdistill import timesteps
from stepdistill.denoiser import Denoiser
from stepdistill.methods.base import Batch, Method, Networks, Pairs
from stepdistill.rewards import RewardModel
from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow, expand

# Of a student of four steps; of fewer, evenly from these.
RHOS = (9.0, 3.0, 1.0, 0.3)


class Net(nn.Module):
    """Small and smooth, in noise levels instead of times."""

    def __init__(self):
        super().__init__()
        self.hidden, self.leave = nn.Linear(3, 8, dtype=torch.float64), nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, x: Tensor, rho: Tensor, end: Tensor) -> Tensor:
        places = ((rho / (1 + rho))[:, None], (end / (1 + end))[:, None])
        return self.leave(self.hidden(torch.cat((x / (1 + rho[:, None]), *places), 1)).tanh())


class Matched(nn.Module):
    """The network as one trained under `schedule` would be."""

    blocks, middle, behind_middle = {"inner.hidden": 8}, "inner.hidden", ("inner.leave",)

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.inner, self.schedule = Net(), schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: None = None, end: Tensor | None = None) -> Tensor:
        rho, end = (self.schedule.rho(t if time is None else time) for time in (t, end))
        return self.inner(x_t / expand(self.schedule.alpha(t), x_t), rho, end)


class Near(RewardModel):
    """A reward, -|x - 2|^2."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -(images - 2).square().sum(1)


LOGNORMAL = {"time_density": "lognormal", "time_mean": 0.0, "time_std": 0.7}
HERE = {"reward": f"{__name__}:Near", "margin": 10.0}
FOURIER = {"eye": "fourier", "arguments": {"dims": 1}}


def at_levels(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """Its times at noise levels instead of places on a schedule's own scale."""

    def grid(schedule: Schedule, steps: int, *_: float) -> tuple[float, ...]:
        levels = torch.tensor(RHOS[:: 4 // steps], dtype=torch.float64)
        return tuple(schedule.t_of_rho(levels).tolist())

    for kind in (EDM, VP, Flow, TrigFlow):
        for name in ("teacher_grid", "few_step_grid", "few_step_ode_grid"):
            monkeypatch.setattr(kind, name, grid)
    sampling = replace(method.sampling, init_noise="sigma", middle_time=0.0)
    for part in [method, *(part.method for part in getattr(method, "parts", ()))]:
        monkeypatch.setattr(part, "sampling", sampling)

    def uniform(schedule: Schedule, noise: Doubles, *_: float) -> Tensor:
        return timesteps.lognormal(schedule, noise, 0.0, 0.7)

    monkeypatch.setattr(timesteps, "uniform", uniform)


def prepared(
    name: str, settings: dict[str, Any], schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> tuple[Method, Networks]:
    """A method and its networks, float64, of fixed random weights."""
    method = worlds.method(name, steps=STEPS.get(name, (1, 2)), **settings)
    at_levels(monkeypatch, method)
    torch.manual_seed(0)
    student, teacher = (Denoiser(Matched(schedule), "x0", schedule) for _ in range(2))
    extras = method.networks(teacher, student)
    with torch.no_grad():
        for key, network in extras.items():
            if key in (
                "fake_score",
                "predecessor",
                "start",
                # copies, which would agree with their originals.
            ):
                for parameter in network.parameters():
                    parameter += 0.1
    if name == "add":
        extras["discriminator"].double()
    return method, Networks({"teacher": teacher, "student": student} | extras, schedule, lambda x0: x0)


def batch(method: Method, schedule: Schedule) -> Batch:
    noise, other = Doubles(range(COUNT), phase="student"), Doubles(range(COUNT), phase="data")
    x0, z, eps = (other.randn(1) for _ in range(3))
    pairs = None
    if (settings := method.pairs(schedule)) is not None:
        times = torch.tensor(settings.times, dtype=torch.float64)
        states = [schedule.add_noise(x0, eps, t.expand(COUNT)) for t in times]
        pairs = Pairs(z, x0, torch.stack(states, 1) if states else z[:, None][:, :0], None)
    return Batch(None, None, (1,), noise.index, noise, x0, pairs, ["a prompt"] * COUNT)
