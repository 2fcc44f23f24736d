"""Plain denoising or flow matching, because teachers are trained by the same trainer.

    minimise E || target(x0, eps, t) - network(x_t, t, c) ||^2,  x_t = alpha(t) x0 + sigma(t) eps

with the target of the network's own kind: eps (Ho et al. 2020, Eq. 14), v (Salimans & Ho 2022), flow (Lipman
et al. 2022), or x0 with EDM's weight (Karras et al. 2022, Eq. 8). Conditions are dropped at random, so that
the network also learns the unconditional prediction guidance needs (Ho & Salimans 2022).

The phase is called "student" because that is the network every run trains; what it leaves behind is
a teacher.

Normal ranges: the loss falls fast and then slowly, without end; x0_std is below that of the data, teacher_x0_std, by
what the noise hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepdistill import timesteps
from stepdistill.denoiser import Cond
from stepdistill.losses import denoising, moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase


class Pretrain(Method):
    """Trains a denoiser from data; no teacher."""

    needs_teacher = False
    needs_images = True
    many_steps = True
    leaves_teacher = True
    rules = ("ode",)

    @dataclass
    class Config:
        # Share of samples trained without their condition.
        cond_dropout: float = 0.1
        time_density: timesteps.Density = "uniform"
        # For lognormal; see timesteps.py. EDM's values; under flow it is the logit-normal density.
        time_mean: float = timesteps.EDM_MEAN
        time_std: float = 1.2
        # Used by previews and written on the card; training does not see it.
        guidance_scale: float = 2.0

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode", "guidance": "cfg", "scale": config.guidance_scale}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        x_t, eps, t, cond = self.noised(nets, batch)
        prediction = nets.student(x_t, t, cond)
        loss = denoising(prediction, batch.x0, eps, nets.sigma_data)
        return {"total": loss} | moments(prediction.x0) | moments(batch.x0, "teacher_")

    def noised(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """(x_t (B, ...), the eps in it, t (B,), the conditions with some of them dropped)."""
        config, noise = self.config, batch.generator
        shape = {"mean": config.time_mean, "std": config.time_std, "unit": nets.sigma_data}
        t = timesteps.draw(config.time_density, nets.schedule, noise, **shape)
        eps = batch.randn()
        return nets.schedule.add_noise(batch.x0, eps, t), eps, t, batch.dropped_cond(config.cond_dropout)
