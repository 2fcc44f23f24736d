"""SwiftBrush: one-step students by variational score distillation (Nguyen and Tran 2023, arXiv 2312.05239).

VSD (Wang et al. 2023, arXiv 2305.16213) with a generator in the place of a 3-D scene. The fake score is a
LoRA on the teacher, so the two share one set of weights, and both are guided by the same scale:

    grad = E_t,eps [ sigma_t^2 (eps_teacher(x_t) - eps_fake(x_t))^T dx0/dtheta ]        the student, G
    minimise E | alpha_t (eps_fake(x_t) - eps) |^2  over the LoRA, on x0 = G(z) held constant

with 10 % of the conditions dropped in the second, since a guided fake score must know the unconditional one.
alpha and sigma are a VP schedule's; under another one they are taken at equal rho, where sigma^2 (eps_teacher
- eps_fake) = rho / (1 + rho^2) (fake - teacher) in x0-space. Updates alternate one to one, the student starts
from unit noise at the schedule's end, and no images are needed. The paper trains the student at 1e-6 and the
LoRA at 1e-3: set optim.fake_score.lr.

Normal ranges: "gap" falls, x0_std stays near teacher_x0_std. A LoRA of too small a rank or learning rate lags,
which shows as a "denoising" loss that grows while x0_std runs away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill import lora
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.losses import distribution_matching, mse
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.score import ScoreDistillation, compared
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling


class VSD(ScoreDistillation):
    @dataclass
    class Config(ScoreDistillation.Config):
        # Of the teacher.
        guidance_scale: float = 4.5
        fake_guidance_scale: float = 4.5
        critic_dropout: float = 0.1
        t_low: float = 0.02
        t_high: float = 0.98
        lora_rank: int = 64
        # LoRA's alpha; updates are multiplied by lora_scale / lora_rank.
        lora_scale: float = 108.0
        # () = the network's own, as with other adapters; paper: to_q, to_v.
        lora_targets: tuple[str, ...] = ()

    def __init__(self, config: Any, sampling: Sampling | None = None):
        if config.tell_place:
            raise UserError(
                "method.tell_place=true makes the fake score another network than the teacher is, and here it is an adapter"
                " over it; set it to false."
            )
        if config.fake_score_lora:
            raise UserError(
                "method.fake_score_lora: here the fake score is always an adapter; set method.lora_rank, lora_scale and"
                " lora_targets instead."
            )
        super().__init__(config, sampling)

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        config = self.config
        base = teacher.backbone()
        return {"fake_score": lora.LoRA(base, config.lora_rank, config.lora_scale, config.lora_targets)}

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        x0, _, told = self.generate(nets, batch)
        # The scores are constants.
        with torch.no_grad():
            real, fake = self.ask(nets, batch, x0, **told)
        rho = nets.schedule.rho(real.t)
        # sigma^2 on the difference of eps, as one of x0.
        weight = rho / (1 + rho**2)
        loss = distribution_matching(x0, real.x0, fake.x0, normalise=False, weight=weight)
        return {"total": loss} | compared(x0, real, fake)

    def critic_error(self, prediction: Prediction, x0: Tensor, eps: Tensor, sigma_data: float) -> Tensor:
        error = mse(prediction.eps, eps)
        # alpha^2.
        return error / (1 + prediction.schedule.rho(prediction.t) ** 2).to(error)
