"""SiDA: adversarial score identity distillation (Zhou et al. 2024, arXiv 2410.14919).

SiD (arXiv 2404.04057) never sees the data: it cannot be better than its teacher. SiDA adds a discriminator that looks
through the fake score's own encoder, trained along with it, at real data:

    critic     |fake(x_t) - x0|^2  +  1/2 ( softplus(-D(real_t)) + softplus(D(x_t)) ),  both at the same t and noise
    student    SiD's L_alpha at x_t  +  gan_weight softplus(-D(x_t)),  gradients through the inputs of all networks

D is a head on the encoder's last activations, at the pass the score is taken from: what it adds to SiD is that head
and, in the critic's turn, half a pass of the fake score. Its loss is a mean over places as SiD's is one over elements;
the published weights, 0.01 against 100, then stand 1e-4 to 1 (Uni-Instruct's code divides it by SiD's w as well; here it is
not divided). With `alpha` 1, as published, the score's part is SIM's L2
(arXiv 2410.16794).

Uni-Instruct (arXiv 2505.20755) is the same for any f-divergence D_f(data || student), by `divergence`. Diffusion turns it
into E h(r) |D|^2 at every noise level, D the difference of the two scores, h = f''(r) r^2 as in f-distill
(stepdistill/methods/f_distill.py) and r = p_data / p_student by the discriminator; SiD and SIM have h = 1, the reverse KL. Its
gradient, by the score identity as theirs, is that of

    h ( L2 - alpha L1 ) - r h' L1 / 2,    h and r h' at x_t, with gradient

exact for alpha 1/2: h weighs the Fisher direction, and its slope along x_t adds the KL direction.

Normal ranges as in SiD: "gap" falls, x0_std stays near teacher_x0_std; the critic's "accuracy" between 0.5 and 0.9.
Where the adversarial part should do more than sharpen, raise gan_weight: at 1e-4 it moves what SiD has brought near.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.discriminator import logit
from stepdistill.errors import UserError
from stepdistill.losses import score_identity
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.f_distill import WEIGHTS, Divergence, weighable
from stepdistill.methods.judged import Judged
from stepdistill.methods.score import compared
from stepdistill.methods.sid import SiD
from stepdistill.sampling import Sampling


class SiDA(SiD, Judged):
    @dataclass
    class Config(SiD.Config, Judged.Config):
        alpha: float = 1.0
        gan_weight: float = 1e-4
        # Half, beside the denoising term.
        gan_critic_weight: float = 0.5
        gan_paired: bool = True
        # Uni-Instruct's f; reverse_kl is SiDA itself.
        divergence: Divergence = "reverse_kl"
        # r is clipped to this range.
        ratio_low: float = 0.1
        ratio_high: float = 10.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.divergence != "reverse_kl" and config.gan_weight <= 0:
            raise UserError(
                f"method.divergence={config.divergence} takes its density ratio from the discriminator; set"
                f" method.gan_weight above 0, not {config.gan_weight:g}."
            )
        if not 0 < config.ratio_low < config.ratio_high:
            raise UserError(
                "method.ratio_low and method.ratio_high must be positive and rising,"
                f" got {config.ratio_low:g} and {config.ratio_high:g}."
            )

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        if config.gan_weight == 0:
            return super().student_loss(nets, batch)
        x0, _, told = self.generate(nets, batch)
        x_t, t = self.diffuse(nets, batch, x0)
        # With gradient, through x_t: into the score's answer and into what the head sees of it.
        real = self.teacher_at(nets, batch, x_t, t)
        with self.watched(nets) as seen:
            fake = self.fake_at(nets, batch, x_t, t, **told)
        logits = self.judge(nets, seen, len(x0))
        weights = 1.0, 0.0
        if config.divergence != "reverse_kl":
            weights = self.weights(logit(logits))
        matching = score_identity(x0, real.x0, fake.x0, config.alpha, config.normalise, *weights)
        losses = {"total": matching, "matching": matching} | compared(x0, real, fake)
        self.generator_term(losses, logits)
        return losses

    def weights(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """h and r h' of log r (B,), both with gradient, over the batch's mean of h."""
        config = self.config
        weighable(config.divergence, len(log_ratio))
        log_ratio = log_ratio.clamp(math.log(config.ratio_low), math.log(config.ratio_high))
        h = WEIGHTS[config.divergence](log_ratio.exp())
        (slope,) = torch.autograd.grad(h.sum(), log_ratio, create_graph=True)
        scale = h.detach().mean()
        return h / scale, slope / scale
