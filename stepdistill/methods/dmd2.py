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

import torch
from torch import Tensor, nn, no_grad

from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.discriminator import Blocks, Discriminator, Logits, chosen_blocks, logit, over_heads
from stepdistill.features import block_features, tap, tap_with_gradient
from stepdistill.losses import distribution_matching, gan_discriminator, gan_generator
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.score import ScoreDistillation, compared
from stepdistill.prediction import Prediction


class DMD2(ScoreDistillation):
    @dataclass
    class Config(ScoreDistillation.Config):
        # Iterations per student update (paper: 5 for ImageNet and SDXL, 10 for SD 1.5).
        student_every: int = 5
        # Of the teacher.
        guidance_scale: float = 1.75
        t_low: float = 0.02
        t_high: float = 0.98
        # Divide the gradient by mean |x0 - mu_real| per sample (DMD Eq. 8); off in few dimensions.
        normalise: bool = True
        # Of the student's GAN term; > 0 needs real images (paper: 1e-3 to 5e-3).
        gan_weight: float = 0.0
        # Of the critic's GAN term beside its denoising term.
        gan_critic_weight: float = 1e-2
        # Of the fake score, a head on each: the paper's middle one, half, or all.
        gan_blocks: Blocks = "middle"

    @property
    def needs_images(self) -> bool:
        return self.config.gan_weight > 0

    @property
    def critics(self) -> tuple[str, ...]:
        return ("fake_score", "discriminator") if self.config.gan_weight > 0 else ("fake_score",)

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        extras = super().networks(teacher, student)
        if self.config.gan_weight > 0:
            extras["discriminator"] = Discriminator([*self.eye(teacher).values()])
        return extras

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        x0 = self.generate(nets, batch)
        x_t, t = self.diffuse(nets, batch, x0)
        # The networks only give the direction, DMD Eq. 7.
        with no_grad():
            real = self.teacher_at(nets, batch, x_t, t)
        # One pass of the fake score serves both: its answer without gradient, its eye for the GAN with.
        gan = config.gan_weight > 0
        blocks = list(self.eye(nets.fake_score)) if gan else []
        with tap_with_gradient(nets.fake_score, blocks) if gan else no_grad() as seen:
            fake = self.fake_at(nets, batch, x_t, t)
        logits = self.judge(nets, seen, len(x0)) if gan else None
        weight = self.weight(real, logits)
        matching = distribution_matching(x0, real.x0, fake.x0, config.normalise, weight)
        losses = {"total": matching, "matching": matching} | compared(x0, real, fake)
        if weight is not None:
            losses["weight_max"] = weight.max() / weight.mean()
        if logits is not None:
            losses["gan"] = over_heads(gan_generator, logits)
            losses["total"] = losses["total"] + config.gan_weight * losses["gan"]
        return losses

    def weight(self, real: Prediction, logits: Logits | None) -> Tensor | None:
        """Per sample (B,), of the gradient, from what teacher and discriminator say at (x_t, t); None = 1."""
        return None

    def critic_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        if config.gan_weight == 0:
            return super().critic_loss(nets, batch)
        # Of the pass that denoises.
        with tap(nets.fake_score, list(self.eye(nets.fake_score))) as seen:
            losses, x0 = self.denoise(nets, batch)
        fake, real = self.judge(nets, seen, len(x0)), self.logits(nets, batch.x0, batch)
        losses["gan"] = over_heads(gan_discriminator, real, fake)
        losses["total"] = losses["total"] + config.gan_critic_weight * losses["gan"]
        losses["accuracy"] = torch.cat((logit(real) > 0, logit(fake) < 0)).float().mean()
        return losses

    def logits(self, nets: Networks, x0: Tensor, batch: Batch) -> Logits:
        """D at x0 diffused to a fresh time of the critic's, independent for real and generated (Sec. 4.3).

        Times and conditions are drawn as those of the generated samples are, or they alone would tell which
        is which.
        """
        t = self.critic_times(nets, batch)
        x_t = nets.schedule.add_noise(x0, batch.randn(), t)
        cond = batch.dropped_cond(self.config.critic_dropout)
        blocks = list(self.eye(nets.fake_score))
        return nets.discriminator(block_features(nets.fake_score, x_t, t, cond, blocks))

    def eye(self, fake_score: nn.Module) -> dict[str, int]:
        """The blocks of the fake score the discriminator looks at, in forward order, with their channels."""
        return chosen_blocks(unwrap(fake_score), self.config.gan_blocks)

    def judge(self, nets: Networks, seen: dict[str, Tensor], count: int) -> Logits:
        """Logits from features of a whole pass; of a guided one, of the conditional half."""
        return nets.discriminator([feature[-count:].float() for feature in seen.values()])
