"""A discriminator on the blocks of the fake score, beside score distillation: what DMD2, f-distill and SiDA share.

The fake score is a denoiser, so what it has learnt to see of diffused samples is at hand. A head on its blocks tells
diffused real from diffused generated samples; both are trained in the critic's turn, and the student's adversarial term
is taken at the very x_t its scores are, in the same pass.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.discriminator import Blocks, Discriminator, Logits, chosen_blocks, logit, over_heads
from stepdistill.features import block_features, tap
from stepdistill.losses import gan_discriminator, gan_generator
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.score import Diffused, ScoreDistillation


class Judged(ScoreDistillation):
    """Base of score distillations with such a head; without it, `gan_weight` 0, they need no images."""

    @dataclass
    class Config(ScoreDistillation.Config):
        # Of the student's adversarial term (DMD2: 1e-3 to 5e-3); > 0 needs real images.
        gan_weight: float = 0.0
        # Of the critic's adversarial term beside its denoising term.
        gan_critic_weight: float = 1e-2
        # Of the fake score, a head on each: the middle one, half, or all.
        gan_blocks: Blocks = "middle"
        # Real samples are judged at the noise and the level of the generated ones, not at their own.
        gan_paired: bool = False

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

    def generator_term(self, losses: Losses, logits: Logits) -> None:
        """Adds the student's adversarial term to what it has."""
        losses["gan"] = over_heads(gan_generator, logits)
        losses["total"] = losses["total"] + self.config.gan_weight * losses["gan"]

    def critic_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        if config.gan_weight == 0:
            return super().critic_loss(nets, batch)
        # Of the pass that denoises.
        with self.watched(nets) as seen:
            losses, made = self.denoise(nets, batch)
        fake = self.judge(nets, seen, len(made.x0))
        real = self.real_logits(nets, batch, made)
        losses["gan"] = over_heads(gan_discriminator, real, fake)
        losses["total"] = losses["total"] + config.gan_critic_weight * losses["gan"]
        losses["accuracy"] = torch.cat((logit(real) > 0, logit(fake) < 0)).float().mean()
        return losses

    def real_logits(self, nets: Networks, batch: Batch, made: Diffused) -> Logits:
        """D at real data, diffused to fresh times of the critic's (DMD2, Sec. 4.3), or as the generated samples were.

        Times are drawn, and conditions dropped, as those of the generated samples are, and what else the fake score is told
        is the same, or they alone would tell which is which. The conditions are the data's own, or D would learn that real
        samples are those beside their captions.
        """
        t, eps, dropped = made.t, made.eps, made.dropped
        if not self.config.gan_paired:
            t, eps = self.critic_times(nets, batch), batch.randn()
            dropped = batch.dropped(self.config.critic_dropout)[1]
        elif eps.shape != batch.x0.shape:
            # Samples shared across phases, of another image size.
            eps = batch.randn()
        x_t = nets.schedule.add_noise(batch.x0, eps, t)
        blocks = list(self.eye(nets.fake_score))
        features = block_features(nets.fake_score, x_t, t, batch.without(dropped), blocks, **made.told)
        return nets.discriminator(features)

    def eye(self, fake_score: nn.Module) -> dict[str, int]:
        """The blocks of the fake score the discriminator looks at, in forward order, with their channels."""
        return chosen_blocks(unwrap(fake_score), self.config.gan_blocks)

    def watched(self, nets: Networks) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Collects those blocks' activations during a pass of the fake score."""
        return tap(nets.fake_score, list(self.eye(nets.fake_score)))

    def judge(self, nets: Networks, seen: dict[str, Tensor], count: int) -> Logits:
        """Logits from features of a whole pass; of a guided one, of the conditional half."""
        return nets.discriminator([feature[-count:].float() for feature in seen.values()])
