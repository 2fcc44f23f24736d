"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

A student G maps noise to images. A fake score mu_fake, trained all the time by plain denoising on what G
makes now, stands for the score of G's own distribution; the frozen teacher mu_real for the data's. The
reverse KL between the two diffused distributions falls fastest along

    grad = E_t,eps [ w_t (mu_fake(x_t, t) - mu_real(x_t, t)) dG/dtheta ],     x_t = alpha_t G(z) + sigma_t eps       (Eq. 2)

which reaches the student as a constant pulled on its output. What DMD2 adds to DMD (arXiv 2311.18828):

    two time scales (Sec. 4.2)      the critics are updated every iteration, the student every `student_every`
    GAN loss (Sec. 4.3)             a head on the fake score's middle block tells diffused real from diffused generated images
    backward simulation (Sec. 4.5)  a multi-step student is trained on the states it meets in its own sampling

Without the GAN (gan_weight 0) it needs no images at all, only conditions. Defaults are the paper's SD 1.5
settings, but for `student_every`, its 5 for ImageNet and SDXL, and `gan_weight`, off here so that a first run
needs no data. The paper's normaliser w of the gradient is DMD's Eq. 8. The student's GAN term is taken at the
very x_t its gradient is, which saves a pass.

Normal ranges: "gap" falls, x0_std stays within half and twice teacher_x0_std; the critic's "accuracy" settles
at 0.6 to 0.8: near 1 the discriminator has won and the student learns nothing from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, no_grad

from stepdistill.discriminator import Logits
from stepdistill.features import tap_with_gradient
from stepdistill.losses import distribution_matching
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.judged import Judged
from stepdistill.methods.score import compared
from stepdistill.prediction import Prediction


class DMD2(Judged):
    @dataclass
    class Config(Judged.Config):
        # Iterations per student update (paper: 5 for ImageNet and SDXL, 10 for SD 1.5).
        student_every: int = 5
        # Of the teacher.
        guidance_scale: float = 1.75
        t_low: float = 0.02
        t_high: float = 0.98
        # Divide the gradient by mean |x0 - mu_real| per sample (DMD Eq. 8); off in few dimensions.
        normalise: bool = True

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        x0, _, told = self.generate(nets, batch)
        x_t, t = self.diffuse(nets, batch, x0)
        # The networks only give the direction, DMD Eq. 7.
        with no_grad():
            real = self.teacher_at(nets, batch, x_t, t)
        # One pass of the fake score serves both: its answer without gradient, its eye for the GAN with.
        gan = config.gan_weight > 0
        blocks = list(self.eye(nets.fake_score)) if gan else []
        with tap_with_gradient(nets.fake_score, blocks) if gan else no_grad() as seen:
            fake = self.fake_at(nets, batch, x_t, t, **told)
        logits = self.judge(nets, seen, len(x0)) if gan else None
        weight = self.weight(real, logits)
        matching = distribution_matching(x0, real.x0, fake.x0, config.normalise, weight)
        losses = {"total": matching, "matching": matching} | compared(x0, real, fake)
        if weight is not None:
            losses["weight_max"] = weight.max() / weight.mean()
        if logits is not None:
            self.generator_term(losses, logits)
        return losses

    def weight(self, real: Prediction, logits: Logits | None) -> Tensor | None:
        """Per sample (B,), of the gradient, from what teacher and discriminator say at (x_t, t); None = 1."""
        return None
