"""TwinFlow: a one-step student from one network alone, no teacher, no fake score, no discriminator (arXiv 2512.05150).

A flow map is told where it jumps to, at or below its own noise. What is above is free, and there the network keeps a twin:
asked to end at pure noise it says the velocity of *its own samples*. Both are one set of weights:

    flow map    iMF's loss on data (stepdistill/methods/imf.py)
    own         flow matching of the twin on the network's one-step samples sg(x0), weighed as the flow map's loss
    twin        g = clamp( v_twin(x_tau) - v(x_tau) ),  x_tau = sg(x0) diffused to tau;  | u - sg(u - g) |^2,  u the one-step answer

Where samples and data are of one law, both velocities must be one, and g nothing: so both are learned by the same loss. (A
weight by a sample's own error, MeanFlow's, turns the mean into something nearer the median.)

The flow map's loss is ours: the authors have a consistency target of second order there, by differences, and deal out a batch
in quarters among the terms. Here each term sees all of it.

g is the difference of fake and real velocity, DMD's direction, with no second network in memory. (The authors tell the twin by a
negative time; ends above the own noise say the same to networks of all families.)

Normal ranges: "gap", the mean square of g before it is clamped, falls; those of imf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.denoiser import unwrap
from stepdistill.errors import UserError
from stepdistill.losses import mse
from stepdistill.methods.base import Batch, Losses, Networks, Phase
from stepdistill.methods.imf import IMF
from stepdistill.methods.meanflow import Point
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, times_like


class TwinFlow(IMF):
    needs_teacher = False

    @dataclass
    class Config(IMF.Config):
        derivative: Literal["forward", "difference", "upwind"] = "difference"
        # Of the twin's flow matching.
        own_weight: float = 1.0
        # Of the pull towards the data.
        twin_weight: float = 0.5
        # Of g, elementwise; 0 = not clamped.
        clamp: float = 1.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.direction != "data":
            raise UserError("method.direction: twinflow has no teacher; set it to data.")
        if config.clamp < 0:
            raise UserError(f"method.clamp must be at least 0, got {config.clamp:g}.")

    def phases(self, step: int) -> Iterator[Phase]:
        config = self.config
        terms = (1.0, self.loss), (config.own_weight, self.own_loss), (config.twin_weight, self.twin_loss)
        yield Phase("student", ("student",), tuple(term for term in terms if term[0]))

    def one_step(self, nets: Networks, batch: Batch, told: dict[str, Tensor]) -> Prediction:
        """From pure noise to data in one jump."""
        first = self.sampling.grid(nets.schedule, 1)[0]
        x = self.sampling.first_input(nets.schedule, batch.randn(), first)
        end = times_like(nets.schedule.t_min, x)
        return nets.student(x, times_like(first, x), batch.cond, end=end, **told)

    def diffused(self, nets: Networks, batch: Batch, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x0 at a time of the flow map's density, in the networks' own schedule."""
        t = nets.schedule.time_of(Flow(), self.times(nets, batch)[0])
        return nets.schedule.add_noise(x0, eps, t), t

    def own_loss(self, nets: Networks, batch: Batch) -> Losses:
        told = self.told(batch)
        with torch.no_grad():
            x0 = self.one_step(nets, batch, told).x0
        eps = batch.randn()
        x_t, t = self.diffused(nets, batch, x0, eps)
        end = times_like(nets.schedule.t_max, x_t)
        squared = (
            (nets.student(x_t, t, batch.cond, end=end, **told).flow - (eps - x0)).square().flatten(1).sum(1)
        )
        at = Point(x_t, t, end, eps, batch.cond, torch.zeros_like(batch.index, dtype=torch.bool), told)
        return {"total": self.weighed(nets, squared, at), "own": squared.detach() / x0[0].numel()}

    def twin_loss(self, nets: Networks, batch: Batch) -> Losses:
        told, student = self.told(batch), unwrap(nets.student)
        said = self.one_step(nets, batch, told)
        with torch.no_grad():
            x_t, t = self.diffused(nets, batch, said.x0, batch.randn())
            fake = student(x_t, t, batch.cond, end=times_like(nets.schedule.t_max, x_t), **told)
            g = fake.flow - student(x_t, t, batch.cond, end=t, **told).flow
            gap = g.square().flatten(1).mean(1)
            g = g.clamp(-self.config.clamp, self.config.clamp) if self.config.clamp else g
            target = said.flow - g
        return {"total": mse(said.flow, target), "gap": gap}
