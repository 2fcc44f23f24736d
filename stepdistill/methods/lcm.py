"""LCM: latent consistency models (Luo et al. 2023, arXiv 2310.04378).

A consistency function f(x_t, t) maps every point of a probability-flow ODE trajectory to its end. LCM learns
the trajectories of the *guided* teacher, and the guidance scale is an input of the student, so that sampling
needs no second network call:

    augmented ODE step   x_s = DDIM( x_t, t -> s ) on  c + w (c - u)  of both x0 and eps               (Eqs. 11, 17)
    boundary             f(x, t, w) = c_skip(t) x + c_out(t) x0_theta(x, t, w),  f(x, 0) = x            (Eq. 5, Sec. 4.1)
    loss                 d( f_theta(x_t, t, w), sg f_ema(x_s, s, w) ),  d pseudo-Huber                  (Eq. 14)

LCM-LoRA (Luo et al. 2023, arXiv 2311.05556) is the same without that input (`tell_guidance: false`): the teacher is
guided by the scale that was drawn, the student hears nothing of it, and low = high fixes one.

t and s are neighbours on the teacher's grid of `ddim_steps` points ("skipping-step", Sec. 4.3). The paper's
w is g - 1; here guidance is g everywhere, and w exists only inside the student's embedding and in the
exported pipeline.

Normal ranges: the loss is one link's error and says little; x0_std stays within a tenth of teacher_x0_std, here
the target's. Both sinking together is the student averaging over trajectories: train longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.denoiser import guided
from stepdistill.jvp import same_draws
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.linked import Linked, LinkWeight
from stepdistill.prediction import Prediction
from stepdistill.schedule import Schedule, expand


class LCM(Linked):
    @dataclass
    class Config(Linked.Config):
        distance: Literal["l2", "pseudo_huber"] = "pseudo_huber"
        # The paper's.
        link_weight: LinkWeight = "uniform"
        # g, drawn uniformly per sample (paper: w in [2, 14]).
        guidance_low: float = 3.0
        guidance_high: float = 15.0
        # g is an input of the student; false is what a LoRA needs.
        tell_guidance: bool = True
        # Points of the teacher's grid, the N of the skipping-step.
        ddim_steps: int = 50
        sigma_data: float = 0.5
        # In c_skip and c_out; LCMScheduler's default.
        timestep_scaling: float = 10.0

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        grid = {"rule": "renoise", "finest": config.ddim_steps}
        if not config.tell_guidance:
            return grid
        scale = (config.guidance_low + config.guidance_high) / 2
        return grid | {"inputs": ("guidance",), "guidance": "input", "scale": scale}

    def boundary(self, prediction: Prediction) -> Tensor:
        """f = c_skip x + c_out x0; c_skip = 1 at the least noise. On whole VP timesteps it is a switch at t
        = 0.
        """
        config, schedule = self.config, prediction.schedule
        t, least = self.table_time(schedule, prediction.t), self.table_time(schedule, schedule.t_min)
        t = expand((t - least) * config.timestep_scaling, prediction.x_t)
        c_skip = config.sigma_data**2 / (t**2 + config.sigma_data**2)
        c_out = t / (t**2 + config.sigma_data**2).sqrt()
        return c_skip * prediction.x_t + c_out * prediction.x0

    def table_time(self, schedule: Schedule, t: Tensor | float) -> Tensor:
        """t in the units of the paper's DDPM table, 0 .. 999. Other schedules are put on it by their noise, at
        rho / (1 + rho), lest the small times of an EDM grid fall inside the switch, where c_skip + c_out is not 1.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        rho = schedule.rho(t)
        return t if schedule.discrete else 999 * rho / (1 + rho)

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        config, noise = self.config, batch.generator
        grid = self.ode_times(nets.schedule).to(batch.index.device)
        i = noise.randint(0, config.ddim_steps)
        t, s = grid[i], grid[i + 1]
        g = config.guidance_low + (config.guidance_high - config.guidance_low) * noise.rand()
        told = {"guidance": g} if config.tell_guidance else {}
        # A number, where there is nothing to guide.
        scale = 1 if config.guidance_low == config.guidance_high == 1 else g
        x_t = nets.schedule.add_noise(batch.x0, batch.randn(), t)
        # Teacher step and target, Eq. 14.
        with torch.no_grad():
            x_s = guided(nets.teacher, x_t, t, batch.cond, batch.uncond, scale).at(s).to(x_t.dtype)
            with same_draws(x_t):
                target = self.boundary(nets.target(x_s, s, batch.cond, **told))
        online = self.boundary(nets.student(x_t, t, batch.cond, **told))
        return self.linked(nets, online, target, nets.schedule, t, s)

    def ode_times(self, schedule: Schedule) -> Tensor:
        """The teacher's grid, falling, with the data end appended: (ddim_steps + 1,)."""
        grid = schedule.few_step_grid(self.config.ddim_steps)
        return torch.tensor((*grid, schedule.t_min), dtype=torch.float64)
