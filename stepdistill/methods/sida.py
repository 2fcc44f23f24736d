"""SiDA: adversarial score identity distillation (Zhou et al. 2024, arXiv 2410.14919).

SiD (arXiv 2404.04057) never sees the data: it cannot be better than its teacher. SiDA adds a discriminator that looks
through the fake score's own encoder, trained along with it, at real data:

    critic     |fake(x_t) - x0|^2  +  1/2 ( softplus(-D(real_t)) + softplus(D(x_t)) ),  both at the same t and noise
    student    SiD's L_alpha at x_t  +  gan_weight softplus(-D(x_t)),  gradients through the inputs of all networks

D is a head on the encoder's last activations, at the pass the score is taken from: what it adds to SiD is that head
and, in the critic's turn, half a pass of the fake score. Its loss is a mean over places as SiD's is one over elements;
the published weights, 0.01 against 100, then stand 1e-4 to 1. With `alpha` 1, as published, the score's part is SIM's L2
(arXiv 2410.16794).

Normal ranges as in SiD: "gap" falls, x0_std stays near teacher_x0_std; the critic's "accuracy" between 0.5 and 0.9.
Where the adversarial part should do more than sharpen, raise gan_weight: at 1e-4 it moves what SiD has brought near.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepdistill.losses import score_identity
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.judged import Judged
from stepdistill.methods.score import compared
from stepdistill.methods.sid import SiD


class SiDA(SiD, Judged):
    @dataclass
    class Config(SiD.Config, Judged.Config):
        alpha: float = 1.0
        gan_weight: float = 1e-4
        # Half, beside the denoising term.
        gan_critic_weight: float = 0.5
        gan_paired: bool = True

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        if config.gan_weight == 0:
            return super().student_loss(nets, batch)
        x0 = self.generate(nets, batch)
        x_t, t = self.diffuse(nets, batch, x0)
        # With gradient, through x_t: into the score's answer and into what the head sees of it.
        real = self.teacher_at(nets, batch, x_t, t)
        with self.watched(nets) as seen:
            fake = self.fake_at(nets, batch, x_t, t)
        matching = score_identity(x0, real.x0, fake.x0, config.alpha, config.normalise)
        losses = {"total": matching, "matching": matching} | compared(x0, real, fake)
        self.generator_term(losses, self.judge(nets, seen, len(x0)))
        return losses
