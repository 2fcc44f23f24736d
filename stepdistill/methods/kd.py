"""KD: knowledge distillation of a sampler (Luhman and Luhman 2021, arXiv 2101.02388).

The teacher's probability-flow ODE is a map from noise to images; the student learns it by regression on
trajectories computed once:

    minimise E_{z, c} || G(z, c) - x0 ||^2,    x0 the end of the guided teacher's ODE (DDIM) from z

A student of several steps also learns the states its own sampling starts from, x_t at the times of its grids
on the same trajectories: G(x_t, t) -> x0. It costs one network and no data, but every pair costs a whole
sampling of the teacher, and a regression to a map with folds is blurred where there are too few of them. What
score distillation (DMD) and consistency training start from as a warm-up.

Normal ranges: "total" falls to a floor; x0_std below teacher_x0_std by more than a tenth is the blur.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, PairSettings, Phase
from stepdistill.schedule import Schedule


class KD(Method):
    @dataclass
    class Config:
        # Of the teacher.
        guidance_scale: float = 1.0
        pair_count: int = 50_000
        # DDIM steps of the teacher for each.
        pair_steps: int = 50

    def pairs(self, schedule: Schedule) -> PairSettings:
        config = self.config
        return PairSettings(
            config.pair_count, config.pair_steps, config.guidance_scale, self.times(schedule)[1:]
        )

    def times(self, schedule: Schedule) -> tuple[float, ...]:
        """All times the student is ever called at, falling."""
        return tuple(
            sorted({t for n in self.sampling.steps for t in self.sampling.grid(schedule, n)}, reverse=True)
        )

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        pairs, times = batch.pairs, self.times(nets.schedule)
        start = self.sampling.first_input(nets.schedule, pairs.z, times[0])
        # (B, K, ...) beside `times`.
        states = torch.cat((start[:, None], pairs.states), 1)
        chosen = batch.generator.randint(0, len(times)).to(start.device)
        x_t = states[torch.arange(len(chosen), device=start.device), chosen]
        t = torch.tensor(times, dtype=torch.float64, device=start.device)[chosen]
        x0 = nets.student(x_t, t, pairs.cond).x0
        teacher = {f"teacher_{name}": value for name, value in moments(pairs.x0).items()}
        return {"total": mse(x0, pairs.x0)} | moments(x0) | teacher
