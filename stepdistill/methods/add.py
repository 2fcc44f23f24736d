"""ADD: adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042).

The critic's eye is a frozen image network, which must be shown pixels; the teacher adds what it knows:

    x_hat = G(x_t, t),  x_t = alpha_t x0 + sigma_t eps                          student times of a few-step grid
    L_adv   hinge; one small head per tapped layer of the frozen network on decode(x_hat) and decode(x0),
            conditioned on the caption's embedding by projection; R1 at the *features*                 (Eq. 2-3)
    L_dist  c(t) |x_hat - sg x0_teacher( alpha_t sg x_hat + sigma_t eps', t )|^2,  c(t) = alpha_t      (Eq. 4)
    loss    L_adv + 2.5 L_dist                                                                         (Eq. 1)

alpha_t is a VP schedule's; under another one it is taken at equal noise, alpha / (alpha^2 + sigma^2)^1/2.

The teacher judges a re-noised x_hat, so L_dist is a score distillation, not a regression to the data.

The eye is pluggable (`eye`, stepdistill/eyes.py). The paper's DINOv2 ViT-S is `dino`, from a directory of its own;
embedded is the micro-CLIP's image tower (`assets/clip`), whose own text tower embeds the caption. Real images go
through the same decoder as generated ones, lest the decoder's own traces tell them apart. Beside the paper: its
critic is also told the image embedding of x0; here it is told the caption's alone.

Normal ranges: the discriminator's "accuracy" between 0.5 and 0.9; "distillation" falls; x0_std within half and twice
teacher_x0_std, what the teacher makes of the re-noised samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill import timesteps
from stepdistill.denoiser import Denoiser, guided
from stepdistill.discriminator import (
    ACCURACY,
    Adversarial,
    Critic,
    Discriminator,
    Logits,
    discriminator_losses,
    generator_loss,
)
from stepdistill.eyes import EYES, Eye
from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.registry import made, resolve
from stepdistill.sampling import Sampling
from stepdistill.schedule import expand


class ADD(Method):
    needs_images = True
    needs_decoder = True
    health: ClassVar[dict[str, tuple[float, float, str]]] = ACCURACY

    @dataclass
    class Config(Adversarial):
        # A name in eyes.EYES, or with --allow-code my_module:MyEye.
        eye: str = "clip"
        # Of that class.
        arguments: dict[str, Any] = field(default_factory=dict)
        # Eq. 2 sums over the heads.
        heads: Literal["mean", "sum"] = "sum"
        # Of |grad D|^2 at the features; the paper's gamma is twice that.
        r1_weight: float = 1e-5
        r1: Literal["exact", "finite"] = "exact"
        # lambda.
        distillation_weight: float = 2.5
        # Of the teacher in L_dist.
        guidance_scale: float = 1.0
        # Of its noise levels.
        time_density: timesteps.Density = "uniform"

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        self.cls = resolve(config.eye, EYES, "eye", where="method.eye")
        self._eye: Eye | None = None

    @property
    def eye(self) -> Eye:
        if self._eye is None:
            self._eye = made(self.cls, self.config.arguments, self.config.eye)
        return self._eye

    @property
    def trained_on(self) -> tuple[str, ...]:
        return (self.eye.directory,) if self.eye.directory else ()

    @property
    def needs_captions(self) -> bool:
        return self.cls.reads_captions

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        eye, kernel = self.eye, self.config.head_kernel
        return {"discriminator": Discriminator(eye.widths, condition=eye.prompt_width, kernel=kernel)}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.student_loss),))
        yield Phase("discriminator", ("discriminator",), ((1.0, self.discriminator_loss),))

    def generate(self, nets: Networks, batch: Batch) -> Tensor:
        """x_hat from noised real data at a time of the grid, drawn evenly; from pure noise at its first."""
        schedule = nets.schedule
        grid = sorted({t for count in self.sampling.steps for t in self.sampling.grid(schedule, count)})
        grid = torch.tensor(grid, dtype=torch.float64, device=batch.index.device)
        t, eps = grid[batch.generator.randint(0, len(grid))], batch.randn()
        first = expand((t == grid[-1]).double(), eps) > 0
        start = self.sampling.first_input(schedule, eps, float(grid[-1]))
        x_t = torch.where(first, start, schedule.add_noise(batch.x0, eps, t))
        return nets.student(x_t, t, batch.cond).x0

    def condition(self, batch: Batch) -> Tensor | None:
        return self.eye.prompts(batch.prompts, batch.index.device) if self.eye.prompt_width else None

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config, condition = self.config, self.condition(batch)
        x0 = self.generate(nets, batch)
        fake = nets.discriminator(self.eye.features(nets.decode(x0)), condition)
        real = None
        if config.gan == "relativistic":
            with torch.no_grad():
                real = nets.discriminator(self.eye.features(nets.decode(batch.x0)), condition)
        losses = {"gan": generator_loss(config, fake, real)}
        losses["distillation"], teacher_x0 = self.distillation(nets, batch, x0)
        teacher = {f"teacher_{name}": value for name, value in moments(teacher_x0).items()}
        total = losses["gan"] + config.distillation_weight * losses["distillation"]
        return {"total": total} | losses | moments(x0) | teacher

    def distillation(self, nets: Networks, batch: Batch, x0: Tensor) -> tuple[Tensor, Tensor]:
        """L_dist, and what the teacher made of the re-noised x_hat."""
        schedule = nets.schedule
        t = timesteps.draw(self.config.time_density, schedule, batch.generator, unit=nets.sigma_data)
        x_t = schedule.add_noise(x0.detach(), batch.randn(), t)
        with torch.no_grad():
            scale = self.config.guidance_scale
            target = guided(nets.teacher, x_t, t, batch.cond, batch.uncond, scale).x0
        weight = schedule.alpha(t) / torch.hypot(schedule.alpha(t), schedule.sigma(t))
        return weight.to(x0) * mse(x0, target), target

    def discriminator_loss(self, nets: Networks, batch: Batch) -> Losses:
        condition = self.condition(batch)
        with torch.no_grad():
            x0 = self.generate(nets, batch)
            seen = [self.eye.features(nets.decode(each)) for each in (batch.x0, x0)]
        (real, critic), (fake, _) = (self.packed(nets, features, condition) for features in seen)
        return discriminator_losses(self.config, (critic, real), (critic, fake), lambda: _like(real, batch))

    def packed(
        self, nets: Networks, features: list[Tensor], condition: Tensor | None
    ) -> tuple[Tensor, Critic]:
        """All features of a sample as one vector (B, n), and the heads as a function of it: where R1 is taken."""
        shapes = [each.shape[1:] for each in features]

        def critic(vector: Tensor) -> Logits:
            parts = vector.split([shape.numel() for shape in shapes], 1)
            unpacked = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
            return nets.discriminator(unpacked, condition)

        return torch.cat([each.flatten(1) for each in features], 1), critic


def _like(vector: Tensor, batch: Batch) -> Tensor:
    return batch.generator.randn(vector.shape[1]).to(vector)
