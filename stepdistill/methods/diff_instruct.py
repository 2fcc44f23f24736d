"""Diff-Instruct (Luo et al. 2023, arXiv 2305.18455).

A one-step student g descends the integral over noise levels of the reverse KL divergence between its own
diffused law and the data's. Its gradient needs the two scores only at the student's samples:

    grad = E_t w_t E_{z,eps} [ (s_fake(x_t) - s_teacher(x_t))^T dx_t/dtheta ],   x_t = alpha g(z) + sigma eps

with s_fake a second denoiser that is trained by denoising on what g makes now. The scores are constants:
nothing flows through the networks. In x0-space the direction is fake - teacher = sigma^2 / alpha (s_fake -
s_teacher), and the published runs weigh that by 1. This is the plain form of what DMD normalises and DMD2
refines; no images are needed.

Both networks are compared and trained at lognormal noise levels (EDM's), and the student starts from sigma
noise at rho = 1. The published code keeps the dropout of teacher and fake score on, under one mask; here it is
off, as in all networks that start from a teacher's weights.

Normal ranges: those of score.py: "gap" falls, x0_std stays near teacher_x0_std.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.losses import distribution_matching
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.score import ScoreDistillation, compared
from stepdistill.timesteps import Density


class DiffInstruct(ScoreDistillation):
    @dataclass
    class Config(ScoreDistillation.Config):
        time_density: Density = "lognormal"

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return super().sampled(config) | {"first_rho": 1.0, "init_noise": "sigma"}

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        x0, _, told = self.generate(nets, batch)
        # The scores are constants.
        with torch.no_grad():
            real, fake = self.ask(nets, batch, x0, **told)
        loss = distribution_matching(x0, real.x0, fake.x0, normalise=False)
        return {"total": loss} | compared(x0, real, fake)
