"""BOOT: data-free distillation by bootstrapping along the signal (Gu et al. 2023, arXiv 2306.05544).

Along one trajectory of the probability-flow ODE that starts at x_T, take the signal y_t = (x_t - sigma_t eps) /
alpha_t, eps the unit noise it started from. It is blurred at t = T, it is the image at t = 0, and it never
contains noise, so a student can be asked for it at every t from the starting noise alone, g(eps, t) ~ y_t:

    signal-ODE   dy/dt = -lambda'(t) (f(x_t, t) - y_t),  lambda = log(sigma / alpha), f the teacher's x0   (Eq. 8)
    step t -> s  y_s = (1 - rho_s / rho_t) f(x_t, t) + (rho_s / rho_t) y_t                    (DDIM, exact for constant f)
    loss         |g(eps, s) - sg[ the step from g(eps, t), at x_t = alpha_t g(eps, t) + sigma_t eps ]|^2 / delta^2   (Eq. 9)
    boundary     |g(eps, T) - f(x_T, T)|^2                                                    (Eq. 10)

Knowledge flows from T down to 0: the student's own g(eps, t) starts the step that teaches it g(eps, s). No real
image, no ODE solved, no second network trained. The student is the teacher asked at x_T and told besides where
its signal is wanted (`end`), so it begins as the teacher's first guess, which is the boundary condition, and is
sampled in one step with `end` at the data.

Here t and s lie `delta` apart in the angle arctan(rho), which is the same place under every schedule; time is
uniform in it. As lambda'(t) is 2 / sin(2 angle), small steps resolve both ends.

Normal ranges: x0_std, of signals at all t, within a tenth of teacher_x0_std, the target's, and rising towards the
data's as knowledge arrives at t = 0; "bootstrap" is divided by delta^2 and says little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.sampling import Sampling
from stepdistill.schedule import Schedule, expand, times_like


class BOOT(Method):
    rules = ("flowmap",)

    @dataclass
    class Config:
        # Of the teacher; 1 = off.
        guidance_scale: float = 1.0
        # Distance of t and s in arctan(rho); pi / 2 is the whole trajectory.
        delta: float = 0.04
        # beta.
        boundary_weight: float = 1.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if self.sampling.steps != (1,):
            raise UserError(
                "student.steps must be [1] for boot, whose student has one step,"
                f" got {list(self.sampling.steps)}."
            )
        if not 0 < config.delta < 1:
            raise UserError(f"method.delta must be above 0 and below 1, got {config.delta:g}.")

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "flowmap", "first_rho": 0.0, "inputs": ("end",)}

    def phases(self, step: int) -> Iterator[Phase]:
        terms = ((1.0, self.bootstrap), (self.config.boundary_weight, self.boundary))
        yield Phase("student", ("student",), terms)

    def times(self, schedule: Schedule, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and s < t, (B,) each; whole under a VP table, where networks know no others."""
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device=batch.index.device)
        low, high = schedule.rho(ends).atan()
        delta = self.config.delta
        angle = low + delta + (high - low - delta) * batch.generator.rand()
        t, s = schedule.t_of_rho(angle.tan()), schedule.t_of_rho((angle - delta).tan())
        if schedule.discrete:
            t = t.round().clamp(min=schedule.t_min + 1)
            s = torch.minimum(s.round(), t - 1)
        return t, s

    def signal(self, nets: Networks, batch: Batch, x_first: Tensor, t: Tensor) -> Tensor:
        """g(eps, t): the student at pure noise, told where its signal is wanted."""
        first = times_like(nets.schedule.t_max, x_first)
        return nets.student(x_first, first, batch.cond, end=t).x0

    def step(self, schedule: Schedule, y_t: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The signal's DDIM move from t to s."""
        kept = expand(schedule.rho(s) / schedule.rho(t), y_t)
        return (1 - kept) * f + kept * y_t

    def bootstrap(self, nets: Networks, batch: Batch) -> Losses:
        schedule, config, eps = nets.schedule, self.config, batch.randn()
        x_first = self.sampling.first_input(schedule, eps, schedule.t_max)
        t, s = self.times(schedule, batch)
        # The target is a constant, Eq. 9.
        with torch.no_grad():
            y_t = self.signal(nets, batch, x_first, t)
            x_t = schedule.add_noise(y_t, eps, t)
            f = guided(nets.teacher, x_t, t, batch.cond, batch.uncond, config.guidance_scale).x0
            target = self.step(schedule, y_t, f, t, s).to(y_t.dtype)
        y_s = self.signal(nets, batch, x_first, s)
        loss = mse(y_s, target) / config.delta**2
        return {"total": loss, "bootstrap": loss} | moments(y_s) | moments(target, "teacher_")

    def boundary(self, nets: Networks, batch: Batch) -> Losses:
        schedule = nets.schedule
        x_first = self.sampling.first_input(schedule, batch.randn(), schedule.t_max)
        first = times_like(schedule.t_max, x_first)
        with torch.no_grad():
            scale = self.config.guidance_scale
            f = guided(nets.teacher, x_first, first, batch.cond, batch.uncond, scale).x0
        loss = mse(self.signal(nets, batch, x_first, first), f)
        return {"total": loss, "boundary": loss}
