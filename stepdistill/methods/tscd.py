"""TSCD: trajectory-segmented consistency distillation (Hyper-SD, Ren et al. 2024, arXiv 2404.13686).

Consistency to the end of the whole trajectory is a hard first task. TSCD cuts the trajectory into k segments
and asks for consistency inside each, the student jumping from t to its segment's lower edge b(t) along its
own prediction, and repeats that with fewer segments, each stage from the one before (k = 8, 4, 2, 1):

    jump           f(x_t, t -> b) = alpha_b x0 + sigma_b eps, both of one prediction; f(x_b, b -> b) = x_b
    teacher step   x_s = DDIM( x_t, t -> s ) of the guided teacher, s = max(next point, b)
    loss           w d( f_theta(x_t, t -> b), sg f_ema(x_s, s -> b) )

With k = 1 it is the consistency trajectory of TCD (arXiv 2402.19159), and so is its sampling: along the line to
(1 - eta) of the next time, then noise up to it (`TCDScheduler`). Stages are written as a recipe's `stages:`,
one segment count each; the paper adds an adversarial term that grows with the stage (`compose` with `ladd`).

The edges are the times a student of k steps is sampled at, so after stage k a k-step student without noise
(eta 0) makes exactly the jumps it was trained on.

Normal ranges: "x0_std" is here of the points jumped to, and stays within a tenth of the target's,
teacher_x0_std; the loss grows when a stage halves the segments and then falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.jvp import same_draws
from stepdistill.methods.base import Batch, Losses, Networks, guided_teacher
from stepdistill.methods.linked import Linked
from stepdistill.sampling import Sampling
from stepdistill.schedule import Schedule
from stepdistill.solvers import ddim


class TSCD(Linked):
    @dataclass
    class Config(Linked.Config):
        # k, of this stage.
        segments: int = 8
        # Points of the teacher's grid.
        ddim_steps: int = 50
        # Of the teacher; 1 = off.
        guidance_scale: float = 7.5

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if not 1 <= config.segments <= config.ddim_steps:
            raise UserError(
                f"method.segments must be from 1 to method.ddim_steps = {config.ddim_steps}, got {config.segments}."
            )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "tcd", "eta": 0.3}

    def lower_edge(self, schedule: Schedule, t: Tensor) -> Tensor:
        """b(t), (B,): the lower edge of the segment (b, top] that holds t; an edge belongs to the one below it."""
        times = (*schedule.few_step_grid(self.config.segments), schedule.t_min)
        edges = torch.tensor(times[::-1], dtype=torch.float64, device=t.device)
        # Edges and teacher's points are computed in two ways: the same time may differ in its last bit.
        return edges[torch.searchsorted(edges, t - 1e-9 * schedule.t_max) - 1]

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        config, schedule = self.config, nets.schedule
        times = (*schedule.teacher_grid(config.ddim_steps), schedule.t_min)
        grid = torch.tensor(times, dtype=torch.float64, device=batch.index.device)
        i = batch.generator.randint(0, config.ddim_steps)
        t = grid[i]
        b = self.lower_edge(schedule, t)
        s = torch.where(grid[i + 1] > b + 1e-9 * schedule.t_max, grid[i + 1], b)
        x_t = schedule.add_noise(batch.x0, batch.randn(), t)
        with torch.no_grad():
            teacher = guided_teacher(nets, batch, config.guidance_scale, schedule)
            x_s = ddim(teacher, x_t, t, s).to(x_t.dtype)
            with same_draws(x_t):
                target = nets.target(x_s, s, batch.cond).at(b)
            target = torch.where((s == b).reshape(-1, *[1] * (x_s.ndim - 1)), x_s, target)
        online = nets.student(x_t, t, batch.cond).at(b)
        return self.linked(nets, online, target, schedule, t, s)
