"""SIM: score implicit matching (Luo et al. 2024, arXiv 2410.16794).

A one-step student g is brought to the teacher's distribution by any divergence of the form

    D = E_t w_t E_{x_t ~ sg p_g,t} [ d( s_g(x_t) - s_teacher(x_t) ) ],      s = grad log p_t          (Sec. 3.1)

The student's score s_g is intractable, and so is its gradient in the student's parameters. The paper's
theorem trades it for the fake score's *input*: at the fake score's optimum D has the gradient of

    L = - E_t w_t E_{z,eps} [ d'(y)^T ( s_fake(x_t) - grad log q(x_t | x_0) ) ],  y = s_fake - s_teacher   (Theorem 3.1)

with x_t = alpha g(z) + sigma eps and the networks' parameters frozen. grad log q(x_t | x_0) = -eps / sigma
carries no gradient, so all of it flows through the inputs of teacher and fake score, inside d' as well:
detaching either is another algorithm. d is pseudo-Huber, which weighs itself and needs no normaliser, or L2.

In x0-space s = (alpha x0 - x_t) / sigma^2, and L is <D, fake - x0> / sqrt(|D|^2 + c^2) with D = teacher -
fake: free of alpha and sigma, which leaves w_t and c per element of x0. No images are needed.

The student starts from sigma noise at rho = 2.5 (t = 625 of Stable Diffusion), where a denoiser already draws
something. Normal ranges: "gap", the mean square of D, falls from its first hundred updates on; a gap that grows
while "denoising" grows too is a fake score left behind (raise its learning rate or `student_every`); x0_std
far below teacher_x0_std is collapse. "total" hovers around 0 and says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepdistill.losses import score_implicit
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.score import ScoreImplicit, compared


class SIM(ScoreImplicit):
    @dataclass
    class Config(ScoreImplicit.Config):
        distance: Literal["pseudo_huber", "l2"] = "pseudo_huber"
        # c, per element and in units of x0.
        huber_c: float = 0.03

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        x0, _, told = self.generate(nets, batch)
        # With gradient, through x_t.
        real, fake = self.ask(nets, batch, x0, **told)
        c = config.huber_c if config.distance == "pseudo_huber" else 0.0
        return {"total": score_implicit(x0, real.x0, fake.x0, c)} | compared(x0, real, fake)
