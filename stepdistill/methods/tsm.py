"""TSM: teacher score matching, the first stage of a smaller student (MSD, Song et al. 2024, arXiv 2410.23274, Sec. 4.2).

Score distillation needs a student that already resembles a denoiser; a network of another size starts from
random weights. So it first learns the teacher's answers by regression:

    loss   w_t |D_student(x_t, t, c) - sg D_teacher(x_t, t, c)|^2,   x_t = alpha_t x0 + sigma_t eps of real data  (Eq. 9)

in the kind the student predicts, with the weight that kind carries. Written as the first of two or more
`stages:`, with `student.init: random` and the smaller network in `family.student_unet`; distribution matching
follows, its fake score from the *teacher*, which needs no such stage. A student of the teacher's own size and
weights has nothing to learn here: its loss is 0.

Multi-student distillation is K ordinary runs of such recipes, each with its `data.partition: k/K`, and
`python -m training.merge OUT STUDENTS...`.

Normal ranges: the loss falls towards 0, by three quarters in a thousand iterations; x0_std begins at two thirds of
teacher_x0_std, the teacher's answers', and is soon within a tenth of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill import timesteps
from stepdistill.denoiser import guided
from stepdistill.losses import denoising, moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase


class TSM(Method):
    needs_images = True
    many_steps = True
    rules = ("ode",)

    @dataclass
    class Config:
        # Of the teacher; 1 = off.
        guidance_scale: float = 1.0
        # Share of samples without their condition, where guidance is off.
        cond_dropout: float = 0.1
        time_density: timesteps.Density = "uniform"
        # For lognormal; see timesteps.py.
        time_mean: float = timesteps.EDM_MEAN
        time_std: float = 1.2

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode"}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        config, schedule, noise = self.config, nets.schedule, batch.generator
        shape = {"mean": config.time_mean, "std": config.time_std, "unit": nets.sigma_data}
        t = timesteps.draw(config.time_density, schedule, noise, **shape)
        x_t = schedule.add_noise(batch.x0, batch.randn(), t)
        cond = batch.dropped_cond(config.cond_dropout) if config.guidance_scale == 1 else batch.cond
        with torch.no_grad():
            said = guided(nets.teacher, x_t, t, cond, batch.uncond, config.guidance_scale)
        prediction = nets.student(x_t, t, cond)
        # The teacher's x0 and eps stand where training from data has the true ones.
        loss = denoising(prediction, said.x0, said.eps, nets.sigma_data)
        return {"total": loss} | moments(prediction.x0) | moments(said.x0, "teacher_")
