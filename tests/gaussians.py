"""Set-ups that tests share: data N(MEAN, STD^2) in one dimension, where denoiser, flow map and target have closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from worlds import COUNT, Doubles

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import SCHEDULES, gaussian
from stepdistill.methods.base import Batch, Networks
from stepdistill.methods.scm import NoiseWeight
from stepdistill.schedule import Schedule

MEAN, STD = 0.3, 0.4
MADE: dict[str, Schedule] = {name: make() for name, make in SCHEDULES.items()}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", MADE.values(), ids=MADE)


def exact(schedule: Schedule) -> Denoiser:
    """The posterior mean of the data, under any condition."""
    return Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)


class Oracle(nn.Module):
    """The exact flow map of N(MEAN, STD^2) as a network of kind "x0": the consistency function, and with `end`
    the x0 whose straight line from x_t passes through the trajectory's point at `end`. least: the noise-to-signal
    ratio where trajectories begin.
    """

    def __init__(self, schedule: Schedule, least: float = 0.0):
        super().__init__()
        self.schedule, self.least = schedule, least

    def forward(self, x_t: Tensor, t: Tensor, cond=None, end: Tensor | None = None) -> Tensor:
        schedule = self.schedule
        # The data itself, where a table ends a little before it.
        alpha, sigma = (f(t)[:, None] for f in (schedule.alpha, schedule.sigma))
        z = (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        if end is None:
            return MEAN + math.hypot(STD, self.least) * z
        alpha_s, sigma_s = (f(end)[:, None] for f in (schedule.alpha, schedule.sigma))
        x_s = alpha_s * MEAN + (alpha_s**2 * STD**2 + sigma_s**2).sqrt() * z
        # x_t = alpha x0 + sigma eps and x_s = alpha_s x0 + sigma_s eps.
        return (sigma * x_s - sigma_s * x_t) / (sigma * alpha_s - sigma_s * alpha)


class Affine(nn.Module):
    """The smallest student with a gradient: x0 = a x_t + b + c t, so that everything has a closed form."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond=None, end: Tensor | None = None) -> Tensor:
        a, b, c = self.weight
        extra = 0 if end is None else 0.05 * end[:, None]
        return a * x_t + b + c * t[:, None] + extra


def nets_of(schedule: Schedule, student: nn.Module | None = None, **more: nn.Module) -> Networks:
    """The exact teacher, and this student, or the oracle, which is its own target."""
    student = Denoiser(student or Oracle(schedule), "x0", schedule)
    modules = {"teacher": exact(schedule), "student": student, "target": student, "weighting": NoiseWeight()}
    return Networks(modules | more, schedule)


def batch_of(count: int = COUNT, step: int = 0) -> Batch:
    """Data and draws in float64, the same at every call."""
    noise = Doubles(range(count), step=step, phase="student")
    return Batch(
        None, None, (1,), noise.index, noise, MEAN + STD * Doubles(range(count), phase="data").randn(1)
    )


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    """Of all of a module's parameters, in one row."""
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(value, list(module.parameters()))])
