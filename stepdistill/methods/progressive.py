"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512).

A student of N steps learns to do in one DDIM step what its predecessor of 2 N steps does in two; then it is the
predecessor of the next. Each stage starts from the weights of the one before (Algorithm 2):

    two steps    x_t -> x_t' -> x_t'',   x_s = alpha_s x0(x_t) + sigma_s eps(x_t),   t, t', t'' of the 2 N grid
    target       x0~ = (x_t'' - (sigma_t'' / sigma_t) x_t) / (alpha_t'' - (sigma_t'' / sigma_t) alpha_t)
    loss         max(SNR(t), 1) |x0_theta(x_t, t) - x0~|^2   (truncated SNR), or SNR + 1, the error of v  (Sec. 4)

x0~ is the x0 whose single DDIM step from x_t ends at x_t''. The trajectories of the first predecessor, the
guided teacher, are thus kept through all stages, and the student is sampled by the same deterministic rule.

Stages are written as a recipe's `stages:`, one number of `student.steps` each; the first has
`predecessor: teacher`, where two steps are of the guided teacher, and may begin at any number.

Normal ranges: "error" falls within a stage and starts the next one higher; x0_std within a sixth of
teacher_x0_std, the target's, within a tenth once a stage has settled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, guided, unwrap
from stepdistill.errors import UserError
from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.sampling import Sampling
from stepdistill.schedule import expand
from stepdistill.solvers import chord


class Progressive(Method):
    needs_images = True
    rules = ("ode",)

    @dataclass
    class Config:
        # Whose two steps are matched.
        predecessor: Literal["teacher", "student"] = "student"
        # Of the teacher, where it is the predecessor; 1 = off.
        guidance_scale: float = 1.0
        weight: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        steps = self.sampling.steps
        if len(steps) > 1:
            raise UserError(
                f"student.steps must be one number per stage for progressive, got {list(steps)};"
                " write one of `stages:` for each."
            )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode"}

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        # As it is when the stage begins.
        own = self.config.predecessor == "student"
        return {"predecessor": unwrap(student).clone()} if own else {}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        schedule, (count,) = nets.schedule, self.sampling.steps
        # Every second point is the student's.
        grid = self.sampling.grid(schedule, 2 * count)
        finer = torch.tensor(grid, dtype=torch.float64, device=batch.index.device)
        i = batch.generator.randint(0, count)
        t, middle = finer[2 * i], finer[2 * i + 1]
        x_t = schedule.add_noise(batch.x0, batch.randn(), t)
        with torch.no_grad():
            x_middle = self.predict(nets, batch, x_t, t).at(middle).to(x_t.dtype)
            second = self.predict(nets, batch, x_middle, middle)
            end = finer[(2 * i + 2).clamp(max=2 * count - 1)]
            # The last of a sampler's steps ends at x0 itself.
            target = torch.where(
                expand((i == count - 1).double(), x_t) > 0,
                second.x0,
                chord(schedule, x_t, second.at(end), t, end),
            ).to(x_t.dtype)
        prediction = nets.student(x_t, t, batch.cond)
        snr = schedule.rho(t) ** -2
        weight = snr.clamp(min=1) if self.config.weight == "truncated_snr" else snr + 1
        error = mse(prediction.x0, target)
        seen = moments(prediction.x0) | moments(target, "teacher_")
        return {"total": weight.to(error) * error, "error": error} | seen

    def predict(self, nets: Networks, batch: Batch, x_t: Tensor, t: Tensor):
        if self.config.predecessor == "student":
            return nets.predecessor(x_t, t, batch.cond)
        return guided(nets.teacher, x_t, t, batch.cond, batch.uncond, self.config.guidance_scale)
