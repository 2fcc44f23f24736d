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
settings, but for `gan_weight`, off here so that a first run needs no data. The paper's normaliser w of the
gradient is DMD's Eq. 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill import timesteps
from stepdistill.denoiser import Denoiser, guided, unwrap
from stepdistill.discriminator import Discriminator
from stepdistill.features import block_features
from stepdistill.losses import denoising, distribution_matching, gan_discriminator, gan_generator
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, simulate


class DMD2(Method):
    @dataclass
    class Config:
        student_every: int = (
            5  # iterations per student update (paper: 5 for ImageNet and SDXL, 10 for SD 1.5)
        )
        guidance_scale: float = 1.75  # of the teacher; 1 = off. The fake score is never guided
        time_density: Literal["uniform", "karras", "lognormal"] = (
            "uniform"  # karras is the paper's choice for EDM
        )
        t_low: float = (
            0.02  # range of the student's noise levels, as fractions of the schedule; the critic sees all
        )
        t_high: float = 0.98
        time_mean: float = -1.2  # of log rho, for lognormal
        time_std: float = 1.2
        normalise: bool = (
            True  # divide the gradient by mean |x0 - mu_real| per sample (DMD Eq. 8); off in few dimensions
        )
        gan_weight: float = 0.0  # of the student's GAN term; > 0 needs real images (paper: 1e-3 to 5e-3)
        gan_critic_weight: float = 1e-2  # of the critic's GAN term beside its denoising term

    @property
    def needs_images(self) -> bool:
        return self.config.gan_weight > 0

    @property
    def _critics(self) -> tuple[str, ...]:
        return ("fake_score", "discriminator") if self.config.gan_weight > 0 else ("fake_score",)

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        extras: dict[str, nn.Module] = {"fake_score": teacher.clone()}
        if self.config.gan_weight > 0:
            extras["discriminator"] = Discriminator([teacher.blocks[teacher.middle]])
        return extras

    def phases(self, step: int) -> Iterator[Phase]:
        if step % self.config.student_every == 0:  # two time-scale update rule, Sec. 4.2
            yield Phase("student", ("student",), ((1.0, self.student_loss),))
        yield Phase("critic", self._critics, ((1.0, self.critic_loss),))

    def generate(self, nets: Networks, batch: Batch) -> Tensor:
        """x0 = G(x_K, t_K) at one of the student's own sampling steps; with gradient through the last call
        only.
        """
        x_t, t, _ = simulate(self, nets, batch)
        return nets.student(x_t, t, batch.cond).x0

    def times(self, nets: Networks, batch: Batch, low: float = 0.0, high: float = 1.0) -> Tensor:
        config = self.config
        mean, std = config.time_mean, config.time_std
        return timesteps.draw(config.time_density, nets.schedule, batch.generator, low, high, mean, std)

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config, schedule = self.config, nets.schedule
        x0 = self.generate(nets, batch)
        t = self.times(nets, batch, config.t_low, config.t_high)
        x_t = schedule.add_noise(x0.detach(), batch.randn(), t)
        with torch.no_grad():  # the networks only give the direction, DMD Eq. 7
            real = guided(nets.teacher, x_t, t, batch.cond, batch.uncond, config.guidance_scale).x0
            fake = nets.fake_score(x_t, t, batch.cond).x0
        matching = distribution_matching(x0, real, fake, config.normalise)
        losses = {"total": matching, "matching": matching, "gap": (fake - real).square().flatten(1).mean(1)}
        if config.gan_weight > 0:
            losses["gan"] = gan_generator(self.logits(nets, x0, batch))
            losses["total"] = losses["total"] + config.gan_weight * losses["gan"]
        return losses | {"x0_mean": x0.detach().mean(), "x0_std": x0.detach().std()}

    def critic_loss(self, nets: Networks, batch: Batch) -> Losses:
        config, schedule = self.config, nets.schedule
        with torch.no_grad():
            x0 = self.generate(nets, batch)
        t, eps = self.times(nets, batch), batch.randn()
        prediction = nets.fake_score(schedule.add_noise(x0, eps, t), t, batch.cond)
        denoise = denoising(prediction, x0, eps, unwrap(nets.fake_score).sigma_data)
        losses = {"total": denoise, "denoising": denoise}
        if config.gan_weight > 0:
            real, fake = self.logits(nets, batch.x0, batch), self.logits(nets, x0, batch)
            losses["gan"] = gan_discriminator(real, fake)
            losses["total"] = losses["total"] + config.gan_critic_weight * losses["gan"]
            losses["accuracy"] = torch.cat((real > 0, fake < 0)).float().mean()
        return losses

    def logits(self, nets: Networks, x0: Tensor, batch: Batch) -> Tensor:
        """D at x0 diffused to a fresh time over the full range, independent for real and generated (Sec.
        4.3).
        """
        t = self.times(nets, batch)
        x_t = nets.schedule.add_noise(x0, batch.randn(), t)
        middle = unwrap(nets.fake_score).middle
        return nets.discriminator(block_features(nets.fake_score, x_t, t, batch.cond, [middle]))
