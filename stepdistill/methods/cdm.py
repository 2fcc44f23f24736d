"""CDM: continuous-time distribution matching (arXiv 2605.06376): any number of steps from one student.

A student trained on one grid of times is good at those alone. CDM draws the grid anew for every batch, and asks besides
that the student be right along the whole of each of its own steps. Decoupled DMD (stepdistill/methods/decoupled_dmd.py)
gives the terms, in flow's times at equal noise:

    grid     N from 1 to `most_steps`;  1 = t_1 > .. > t_N, inner times uniform in [grid_low, grid_high]
    anchor   the student's own ODE without gradient to one of them, x_t;  x0 = student(x_t, t)
    loss     DM + CA at x0
    CDM      t' uniform, x' = sg( the point at t' of the line that this answer makes ),  DM at student(x', t')

No gradient reaches x': the second answer alone is taught. The student follows its ODE (DDIM) at any number of steps.

The fake score learns the mixture of the answers at all places of the grid, as the paper has it. CA pushes early answers,
which have the most noise above them, and hardly the late ones; DM, equal for all, drives the late ones the other way. Without
guidance each place may draw a part of the data, and all together the whole. `tell_place` holds every place by itself; t' is
then drawn in [grid_low, grid_high], since of places outside of the grids the fake score has been told none.

Normal ranges: those of decoupled_dmd; "between", DM at x', near "matching".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.decoupled_dmd import DecoupledDMD
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, Schedule, times_like


class CDM(DecoupledDMD):
    rules = ("ode",)

    @dataclass
    class Config(DecoupledDMD.Config):
        # The most of N.
        most_steps: int = 28
        # Range of the inner times of a grid (paper: 0.25 to 0.95 for Stable Diffusion 3, 0.02 to 0.98 for LongCat).
        grid_low: float = 0.25
        grid_high: float = 0.95
        # Of DM at x'; 0 = off.
        between_weight: float = 1.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if not 1 <= config.most_steps <= 1000:
            raise UserError(f"method.most_steps must be from 1 to 1000, got {config.most_steps}.")
        if not 0 < config.grid_low < config.grid_high < 1:
            raise UserError(
                "method.grid_low and method.grid_high must be flow times between 0 and 1 in rising order,"
                f" got {config.grid_low:g} and {config.grid_high:g}."
            )
        if config.simulated != "states":
            raise UserError(
                f"method.simulated={config.simulated} chooses among the grids of student.steps, and this method draws a grid of"
                " its own for every batch; leave it out."
            )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode"}

    @property
    def several(self) -> bool:
        # Of a fresh grid in every batch, whatever it is sampled by.
        return True

    def grid(self, schedule: Schedule, batch: Batch) -> list[float]:
        """Times of a fresh grid, falling from the schedule's end; the same for the whole global batch."""
        config, noise = self.config, batch.generator
        count = noise.shared_randint(1, config.most_steps + 1)
        shares = torch.tensor(
            [noise.shared_randint(0, 2**20) / 2**20 for _ in range(count - 1)], dtype=torch.float64
        )
        inner = config.grid_low + (config.grid_high - config.grid_low) * shares.sort(descending=True).values
        times = schedule.t_of_rho(Flow().rho(inner))
        times = times.round().unique().flip(0) if schedule.discrete else times
        return [schedule.t_max, *(t for t in times.tolist() if t < schedule.t_max)]

    @torch.no_grad()
    def anchor(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        times = self.grid(nets.schedule, batch)
        place = batch.generator.shared_randint(min(self.first, len(times) - 1), len(times))
        x = self.sampling.first_input(nets.schedule, batch.randn(), times[0])
        for t, s in itertools.pairwise(times[: place + 1]):
            x = nets.student(x, times_like(t, x), batch.cond).at(times_like(s, x)).to(x.dtype)
        return x, times_like(times[place], x)

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        losses, said = self.at_anchor(nets, batch)
        if self.config.between_weight:
            x, t = self.between(nets, batch, said)
            second, _ = self.matching(nets, batch, nets.student(x, t, batch.cond).x0, t)
            losses["between"] = second["matching"]
            losses["total"] = losses["total"] + self.config.between_weight * losses["between"]
        return losses

    @torch.no_grad()
    def between(self, nets: Networks, batch: Batch, said: Prediction) -> tuple[Tensor, Tensor]:
        """x' and its time, uniform in flow's, on the line of the student's answer; clear of the ends, where it says nothing,
        and where the fake score is told of it, within the grids' range.
        """
        schedule, config = nets.schedule, self.config
        low, high = config.t_low, config.t_high
        if config.tell_place:
            low, high = config.grid_low, config.grid_high
        share = low + (high - low) * batch.generator.rand()
        t = schedule.t_of_rho(Flow().rho(share))
        t = t.round() if schedule.discrete else t
        return said.at(t).to(said.x_t.dtype), t
