"""sCM: continuous-time consistency models (Lu & Song 2024, arXiv 2410.11081).

Discrete consistency training compares two neighbours on a trajectory; here their distance goes to zero, and
what remains is the derivative of the student along the trajectory. Under TrigFlow (x = cos(t) x0 + sin(t) z,
z of the data's standard deviation s) the student is f = cos(t) x - s sin(t) F(x, t), and

    direction    dx/dt = s F_teacher(x, t)  (distillation), or  cos(t) z - sin(t) x0  (training)    (Sec. 3)
    tangent      cos(t) df/dt = -cos^2(t) (s F - dx/dt) - r (cos(t) sin(t) x + s J),
                 J = derivative of F along (cos(t) sin(t) dx/dt, cos(t) sin(t))                     (Eq. 6, Sec. 4.1)
    normalised   g = tangent / (|tangent| + c)                                                      (Sec. 4.1)
    loss         e^u(t) w(t) / D |s F - sg(s F + g)|^2 - u(t),  w = 1 / (s tan(t))                  (Eq. 8)

Its gradient is -2 w g dF: the loss itself is known beforehand (|g|^2, about 1 after normalisation), so it is
`tangent`, the mean norm before normalisation, that falls as the student becomes consistent. r rises from 0 to
1 over `warmup` updates, because the second half of the tangent is what diverges early. u is a small learned
weight of the noise level. The teacher may be of any schedule, it is asked in TrigFlow's terms. rCM
(arXiv 2510.08431) has neither w nor u: `prior: false, learned_weight: false`.

Networks whose time embedding is steep (Stable Diffusion's, 1000 t into sinusoids of period down to 2 pi)
have a J that says more about the embedding than about the image; `derivative: difference` with a
`difference_step` that spans whole timesteps (1e-2) smooths it; `upwind`, towards less noise, is rCM's.

Normal ranges: "tangent" below 100 and falling once r is 1; "distance" about 1 / D; x0_std below teacher_x0_std, here
the data's, by as much as the noise hides, and far below it in collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill import timesteps
from stepdistill.denoiser import Cond, Denoiser, unwrap
from stepdistill.jvp import LONGEST, directional, fine_step, same_draws
from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, guided_teacher
from stepdistill.schedule import TrigFlow, expand
from stepdistill.timesteps import as_edm


class SCM(Method):
    needs_images = True
    health: ClassVar[dict[str, tuple[float, float, str]]] = {
        "student/tangent": (0.0, 100.0, "divergence: raise method.warmup, or use derivative: difference"),
    }

    @dataclass
    class Config:
        # Distillation (sCD) or training (sCT).
        direction: Literal["teacher", "data"] = "teacher"
        # Of the teacher.
        guidance_scale: float = 1.0
        # H, updates until r is 1.
        warmup: int = 10_000
        # c of the normalisation.
        tangent_c: float = 0.1
        normalise: bool = True
        # w of the loss; rCM has none.
        prior: bool = True
        # u of the loss; likewise.
        learned_weight: bool = True
        # Of the log-normal times, see timesteps.py: the paper's P_mean of -1.0 is of data of deviation 0.5.
        time_mean: float = -0.307
        time_std: float = 1.4
        derivative: Literal["forward", "difference", "upwind"] = "forward"
        # Of the differences, of log rho; 0 = as much as moves the network's time by a tenth of a step, at most 1e-3.
        difference_step: float = 0.0

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        # The second of two steps is SCMScheduler's; the paper has 1.1.
        return {"rule": "renoise", "first_rho": 80.0, "middle_time": 1.3}

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"weighting": NoiseWeight()} if self.config.learned_weight else {}

    def phases(self, step: int) -> Iterator[Phase]:
        r = min(1.0, (step + 1) / max(1, self.config.warmup))
        trains = ("student", "weighting") if self.config.learned_weight else ("student",)
        yield Phase("student", trains, ((1.0, partial(self.loss, r=r)),))

    def loss(self, nets: Networks, batch: Batch, r: float = 1.0) -> Losses:
        config, student = self.config, unwrap(nets.student)
        trig = TrigFlow(student.sigma_data)
        t = self.times(nets, batch, trig)
        x0, eps = batch.x0, batch.randn()
        x_t = trig.add_noise(x0, eps, t)
        with torch.no_grad():
            dx_dt = self.velocity(nets, batch, trig, x_t, t, eps)
        with same_draws(x_t):
            _, tangent = self.tangent(student, batch.cond, trig, x_t, t, dx_dt, r)
        norm = tangent.flatten(1).norm(dim=1)
        g = tangent / (expand(norm, x_t) + config.tangent_c) if config.normalise else tangent
        online = nets.student(x_t, t, batch.cond, in_schedule=trig)
        F = trig.sigma_data * online.F
        # sg F is of this very pass: the derivative's has other roundings, or is a mean of two.
        distance = mse(F, F.detach() + g)
        total = distance / trig.rho(t).to(distance) if config.prior else distance
        if config.learned_weight:
            u = nets.weighting(trig.rho(t)).to(distance)
            total = u.exp() * total - u
        seen = moments(online.x0) | moments(x0, "teacher_")
        return {"total": total, "tangent": norm, "distance": distance} | seen

    def times(self, nets: Networks, batch: Batch, trig: TrigFlow) -> Tensor:
        """TrigFlow times of log-normal rho, within what the teacher knows and the student is sampled at."""
        config = self.config
        frame = as_edm(nets.schedule, most=self.sampling.first_rho or 80.0)
        shape = config.time_mean, config.time_std, trig.sigma_data
        rho = timesteps.lognormal(frame, batch.generator, *shape)
        # A difference moves log rho by its step; beyond its range a network is no function of time.
        inside = 1 + 2 * (config.difference_step or LONGEST)
        return trig.t_of_rho(rho.clamp(frame.t_min * inside, frame.t_max / inside))

    def velocity(
        self, nets: Networks, batch: Batch, trig: TrigFlow, x_t: Tensor, t: Tensor, eps: Tensor
    ) -> Tensor:
        """dx_t/dt: where the trajectory, or the straight noising path, goes."""
        if self.config.direction == "data":
            return expand(trig.d_alpha(t), x_t) * batch.x0 + expand(trig.d_sigma(t), x_t) * eps
        return guided_teacher(nets, batch, self.config.guidance_scale, trig)(x_t, t).velocity.to(x_t.dtype)

    def tangent(
        self, student: Denoiser, cond: Cond, trig: TrigFlow, x_t: Tensor, t: Tensor, dx_dt: Tensor, r: float
    ) -> tuple[Tensor, Tensor]:
        """F and cos(t) df/dt, both without a graph; r = 1 is the exact derivative."""
        cos, sin = expand(t.cos(), x_t), expand(t.sin(), x_t)

        def network(x: Tensor, time: Tensor) -> Tensor:
            return student(x, time, cond, in_schedule=trig).F

        along = (cos * sin * dx_dt, t.cos() * t.sin())
        config = self.config
        step = config.difference_step or fine_step(student.native, trig, t, along[1])
        F, J = directional(config.derivative, network, (x_t, t), along, step)
        s = trig.sigma_data
        return F, -(cos**2) * (s * F - dx_dt) - r * (cos * sin * x_t + s * J)


class NoiseWeight(nn.Module):
    """u(t), the learned logarithm of a loss weight, as a function of the noise level; 0 at the start."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.25, 4.0, width) * math.pi / 4)
        self.leave = nn.Linear(2 * width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, rho: Tensor) -> Tensor:
        angles = rho.clamp(1e-3, 1e3).log().float()[:, None] * self.frequencies
        return self.leave(torch.cat((angles.sin(), angles.cos()), 1))[:, 0]
