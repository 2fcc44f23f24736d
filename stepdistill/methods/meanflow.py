"""MeanFlow: a two-time student of the average velocity (Geng et al. 2025, arXiv 2505.13447).

Under flow matching (x = (1 - t) x0 + t eps) the average velocity between t and r < t is u(x, t, r) = 1/(t - r)
times the integral of the velocity v along the trajectory; x_t - (t - r) u is then the point at r, in one call.
Differentiating (t - r) u by t gives an identity with no integral in it:

    u = v - (t - r) du/dt,  du/dt = derivative of u along (v, dt = 1, dr = 0)                       (Eqs. 6, 8)
    loss   w |u_theta - sg(v - (t - r) du_theta/dt)|^2,  w = sg 1 / (|.|^2 + c)^p                   (Eq. 9)

v is the teacher's (distillation) or eps - x0 (training; `guidance_scale` then mixes the student's own
velocities into it, Sec. 4.2, and conditions are dropped at random). For `equal_share` of the samples r
is t, where the identity is plain flow matching. The student is told where its jump ends (`end`); asked in
flow's terms whatever schedule its network was trained in.

Normal ranges: the weight makes the loss nearly constant; "error", the root of |.|^2 / D before it, falls and stays
below the spread of eps - x0, and "derivative" does not grow. x0_std is below teacher_x0_std, here the data's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stepdistill import timesteps
from stepdistill.denoiser import Cond, Denoiser, unwrap
from stepdistill.jvp import directional, fine_step, same_draws
from stepdistill.losses import moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, guided_teacher
from stepdistill.schedule import Flow, expand
from stepdistill.timesteps import as_edm


class Point(NamedTuple):
    """Data diffused with eps (B, ...) to flow's time t, from which the student jumps to r (B,); its condition, which samples
    lost theirs (B,), and what else the student is told.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    eps: Tensor
    cond: Cond
    dropped: Tensor
    told: dict[str, Tensor]


# By `end_by`, what a student's network is made ready for.
ENDS = {"embedding": "end", "depth": "end_by_depth"}


class MeanFlow(Method):
    needs_images = True
    rules = ("flowmap",)

    @dataclass
    class Config:
        # distillation, or training from data alone.
        direction: Literal["teacher", "data"] = "teacher"
        # Of the teacher, or omega of the training form.
        guidance_scale: float = 1.0
        # Share of the conditional velocity in the guided target of the training form.
        kappa: float = 0.0
        # Of the training form.
        cond_dropout: float = 0.1
        # Of samples with r = t.
        equal_share: float = 0.75
        # Of the one log-normal draw (timesteps.py), under flow the logit-normal density.
        time_mean: float = -0.4
        time_std: float = 1.0
        # Of the other: the paper's CIFAR-10 run has -0.6, 1.6 and -4, 1.6.
        end_mean: float = -0.4
        end_std: float = 1.0
        # p; 0 is the plain square, 0.5 resembles a Huber loss.
        weight_power: float = 1.0
        weight_c: float = 1e-3
        derivative: Literal["forward", "difference", "upwind"] = "forward"
        # Of the differences, of flow time; 0 = as much as moves the network's time by a tenth of a step, at most 1e-3.
        difference_step: float = 0.0
        # How the student is told r: by an embedding of its own, or as the time that its later layers see.
        end_by: Literal["embedding", "depth"] = "embedding"

        def __post_init__(self) -> None:
            for name in ("equal_share", "cond_dropout"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} must be a share from 0 to 1, got {getattr(self, name):g}.")
            if self.difference_step < 0:
                raise ValueError(f"difference_step must be at least 0, got {self.difference_step:g}.")
            if self.weight_c <= 0:
                raise ValueError(f"weight_c must be above 0, got {self.weight_c:g}.")

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "flowmap", "inputs": (ENDS[config.end_by],)}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def times(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times t and r <= t, (B,) each, of noise levels the network knows."""
        config, noise = self.config, batch.generator
        frame = as_edm(nets.schedule, most=self.sampling.first_rho or 1e4)
        densities = (config.time_mean, config.time_std), (config.end_mean, config.end_std)
        both = [timesteps.lognormal(frame, noise, *density, nets.sigma_data) for density in densities]
        t, r = (Flow().t_of_rho(pick(*both)) for pick in (torch.maximum, torch.minimum))
        return t, torch.where(noise.rand() < config.equal_share, t, r)

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        at = self.point(nets, batch)
        with torch.no_grad():
            v = self.velocity(nets, batch, at)
            along = self.along(nets, at, v)
            with same_draws(at.x_t):
                derivative = self.derivative(unwrap(nets.student), at, along)
        prediction = nets.student(at.x_t, at.t, at.cond, in_schedule=Flow(), end=at.r, **at.told)
        squared = (prediction.flow - v + expand(at.t - at.r, v) * derivative).square().flatten(1).sum(1)
        error = (squared.detach() / batch.x0[0].numel()).sqrt()
        seen = {"error": error, "derivative": derivative.flatten(1).norm(dim=1)}
        losses = {"total": self.weighed(nets, squared, at)} | seen
        return losses | moments(prediction.x0) | moments(batch.x0, "teacher_")

    def point(self, nets: Networks, batch: Batch) -> Point:
        """Data diffused to a drawn t, and where to jump from there."""
        t, r = self.times(nets, batch)
        eps = batch.randn()
        cond, dropped = batch.dropped(self.config.cond_dropout if self.config.direction == "data" else 0.0)
        return Point(Flow().add_noise(batch.x0, eps, t), t, r, eps, cond, dropped, self.told(batch))

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """What the student is told besides the end of its jump."""
        return {}

    def weighed(self, nets: Networks, squared: Tensor, at: Point) -> Tensor:
        """The loss of squared errors (B,), each summed over a sample's elements."""
        return squared / (squared.detach() + self.config.weight_c) ** self.config.weight_power

    def along(self, nets: Networks, at: Point, v: Tensor) -> Tensor:
        """The direction in x that u is differentiated along."""
        return v

    def derivative(self, student: Denoiser, at: Point, along: Tensor) -> Tensor:
        """du/dt, without a graph."""

        flow = Flow()

        def u(x: Tensor, time: Tensor) -> Tensor:
            return student(x, time, at.cond, in_schedule=flow, end=at.r, **at.told).flow

        config, tangents = self.config, (along, torch.ones_like(at.t))
        step = config.difference_step or fine_step(student.native, flow, at.t, tangents[1])
        # The last time a network knows is drawn as often as all noise beyond would be.
        native = student.native
        ends = native.rho(torch.tensor([native.t_min, native.t_max], dtype=torch.float64)).clamp(max=1e9)
        first, last = flow.t_of_rho(ends).to(at.t)
        room = last - at.t, at.t - first
        return directional(config.derivative, u, (at.x_t, at.t), tangents, step, room)[1]

    def velocity(self, nets: Networks, batch: Batch, at: Point) -> Tensor:
        """dx_t/dt, guided (Sec. 4.2 in the training form, where samples that lost their condition keep v itself)."""
        config = self.config
        if config.direction == "teacher":
            asked = guided_teacher(nets, batch, config.guidance_scale, Flow())
            return asked(at.x_t, at.t).flow.to(at.x_t.dtype)
        v = at.eps - batch.x0
        if config.guidance_scale == 1 and config.kappa == 0:
            return v
        told, untold = (self.own_velocity(nets, at, cond) for cond in (batch.cond, batch.uncond))
        omega, kappa = config.guidance_scale, config.kappa
        guided = omega * v + kappa * told + (1 - omega - kappa) * untold
        return torch.where(expand(at.dropped, v) > 0, v, guided)

    def own_velocity(self, nets: Networks, at: Point, cond: Cond) -> Tensor:
        """The student's average over no time."""
        return unwrap(nets.student)(at.x_t, at.t, cond, in_schedule=Flow(), end=at.t, **at.told).flow
