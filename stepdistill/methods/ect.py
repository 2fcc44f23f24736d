"""ECT: easy consistency tuning (Geng et al. 2024, "Consistency Models Made Easy", arXiv 2406.14548).

A pretrained denoiser is already the consistency model of pairs whose second point is the data itself. ECT
starts there and brings the pair's points together while it trains, so that one curriculum leads from
diffusion to consistency:

    pair      x_t = x0 + t eps,  x_r = x0 + r eps,  the same eps
    mapping   r / t = max(0, 1 - n(t) / q^(a + 1)),  n(t) = 1 + k sigmoid(-b t / s),  a = stage
    loss      w(t) (sqrt(|f(x_t, t) - sg f(x_r, r)|^2 + c^2) - c),  w = 1 / (t - r)

No teacher is called and no average is kept: the target is the same network with its gradient stopped, on the
same dropout mask if it has any; where r is 0 it is the data. With `teacher_step` x_r comes from one Euler step
of the guided teacher instead (consistency distillation under the same mapping). All in EDM's terms, whatever
schedule the network was trained in; s is the data's standard deviation, 0.5 in the paper, whose b is 1.

Normal ranges: "ratio", the mean r / t, rises with the stage towards 1 and the loss with it; x0_std stays within a
tenth of teacher_x0_std, here the target's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepdistill import timesteps
from stepdistill.jvp import same_draws
from stepdistill.losses import moments, vector_huber
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, consistency, guided_teacher
from stepdistill.solvers import euler
from stepdistill.timesteps import as_edm


class ECT(Method):
    needs_images = True

    @dataclass
    class Config:
        # Updates per stage (the paper's CIFAR-10 run: 250 ticks of 100 batches of 128).
        double_every: int = 25_000
        # The last is kept to the end; its r / t is 0.996 with q = 2.
        stages: int = 8
        q: float = 2.0
        k: float = 8.0
        b: float = 0.5
        # Of the log-normal t, see timesteps.py; the paper's -1.1 is of data of deviation 0.5.
        time_mean: float = -0.407
        time_std: float = 2.0
        # c of the loss; 0 is the plain norm.
        huber_c: float = 0.0
        # x_r by the teacher's ODE instead of the data's own noise.
        teacher_step: bool = False
        # Of that teacher.
        guidance_scale: float = 1.0

        def __post_init__(self) -> None:
            for name in ("double_every", "stages"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "renoise", "first_rho": 80.0}

    def phases(self, step: int) -> Iterator[Phase]:
        stage = min(step // self.config.double_every, self.config.stages - 1)
        yield Phase("student", ("student",), ((1.0, partial(self.loss, stage=stage)),))

    def ratio(self, t: Tensor, stage: int, unit: float = 1.0) -> Tensor:
        """r / t of the mapping function, (B,) for EDM times (B,); unit: the data's standard deviation."""
        config = self.config
        n = 1 + config.k * torch.sigmoid(-config.b * t / unit)
        return (1 - n / config.q ** (stage + 1)).clamp(min=0)

    def loss(self, nets: Networks, batch: Batch, stage: int = 0) -> Losses:
        config, frame = self.config, as_edm(nets.schedule)
        unit = nets.sigma_data
        t = timesteps.lognormal(frame, batch.generator, config.time_mean, config.time_std, unit)
        r = t * self.ratio(t, stage, unit)
        r = torch.where(r > frame.t_min, r, 0.0)
        eps = batch.randn()
        x_t = frame.add_noise(batch.x0, eps, t)
        with torch.no_grad(), same_draws(x_t):
            if config.teacher_step:
                teacher = guided_teacher(nets, batch, config.guidance_scale, frame)
                x_r = euler(teacher, x_t, t, r).to(x_t.dtype)
            else:
                x_r = frame.add_noise(batch.x0, eps, r)
            target = consistency(nets.student(x_r, r, batch.cond, in_schedule=frame))
        online = consistency(nets.student(x_t, t, batch.cond, in_schedule=frame))
        distance = vector_huber(online, target, config.huber_c)
        total = distance / (t - r).clamp(min=1e-8).to(distance)
        seen = moments(online) | moments(target, "teacher_")
        return {"total": total, "ratio": (r / t).mean()} | seen
