"""SiD: score identity distillation (Zhou et al. 2024, arXiv 2404.04057).

The Fisher divergence E |s_g - s_teacher|^2 between the diffused laws of a one-step student g and the data has
the student's own score in it. Two estimates of its gradient are at hand, each biased in its own way while
the fake score is imperfect:

    L1 = w^2 |teacher - fake|^2                                     the fake score in the score's place
    L2 = w^2 <teacher - fake, teacher - x0>                         one of the two by the score identity
    L  = L2 - alpha L1                                              (Sec. 4)

all in x0-space at x_t = alpha_t g(z) + sigma_t eps. Subtracting more of L1 than it has (alpha 1.2) works best
in the paper. At the optimal fake score alpha = 0.5 is the exact gradient of the Fisher divergence, and
alpha = 1 that of SIM's L2, whose sampling law is held. The gradient flows through the *inputs* of teacher and
fake score; their parameters are frozen. Each sample is divided by mean |x0 - teacher|, a constant.

The paper sums over pixels and multiplies by 100; here it is the mean, which Adam does not notice. Use
optim.betas = [0, 0.999] as the paper does: momentum makes the two networks circle each other. No images are
needed. SiD-LSG (arXiv 2406.01561), for Stable Diffusion, guides teacher and fake score alike, the latter while
it learns too (`critic_guidance_scale`) and with a tenth of the conditions dropped (`critic_dropout`); alpha is 1 and both
see times uniform between 20 and 979, not EDM's: `training/recipes/sd15_sid_lsg.yaml`.

Normal ranges as in SIM: "gap" falls, x0_std stays near teacher_x0_std. "total" is negative for alpha > 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepdistill.losses import score_identity
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.score import ScoreImplicit, compared


class SiD(ScoreImplicit):
    @dataclass
    class Config(ScoreImplicit.Config):
        alpha: float = 1.2
        # By mean |x0 - teacher_x0| per sample; off in few dimensions.
        normalise: bool = True

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        x0, _, told = self.generate(nets, batch)
        # With gradient, through x_t.
        real, fake = self.ask(nets, batch, x0, **told)
        loss = score_identity(x0, real.x0, fake.x0, config.alpha, config.normalise)
        return {"total": loss} | compared(x0, real, fake)
