"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

The frozen teacher is the discriminator's eye. Real and generated latents are noised again, the teacher looks
at them, and one small head per block tells from its activations which is which, at every place:

    x_hat = G(x_t, t),  x_t = alpha_t x0 + sigma_t eps                             student times of a few-step grid
    x'    = alpha_tau x + sigma_tau eps',   log rho(tau) ~ N(m, s^2)               for x real and x_hat alike (Sec. 3)
    D     = sum over blocks of the heads' hinge losses;  G minimises -D(x'_hat)

The level tau steers what is judged: much noise leaves composition, little leaves texture; the paper's flow
time is logit-normal(1, 1), which is this very law of rho. No pixel is decoded and nothing but the heads is
trained on the discriminator's side. The gradient reaches the student through the input of the frozen teacher.

There is no distillation loss. What ties the student to the teacher is that "real" data are best the teacher's
own guided samples (Sec. 3.2): put them into `data`. Each block sees time and condition through the teacher, so
the heads need neither.

Beside the paper: other games and the gradient penalty R1 (`Adversarial`); SANA-Sprint's student times (a
density with an atom at pure noise) and its misaligned pairs, real images under another's caption, counted as
fake (arXiv 2503.09641, Sec. 3.3). Hinge on batches of 1 degenerates; use 2 at least per process.

Normal ranges: the discriminator's "accuracy" between 0.5 and 0.9, at 0.5 in a student that keeps up with it, and at
1 when it wins; x0_std within half and twice teacher_x0_std, here that of the real data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill import timesteps
from stepdistill.denoiser import Cond, Denoiser, map_cond, unwrap
from stepdistill.discriminator import (
    ACCURACY,
    Adversarial,
    Blocks,
    Discriminator,
    Logits,
    chosen_blocks,
    discriminator_losses,
    generator_loss,
)
from stepdistill.errors import UserError
from stepdistill.features import block_features
from stepdistill.losses import moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.schedule import Schedule, expand


class LADD(Method):
    needs_images = True
    health: ClassVar[dict[str, tuple[float, float, str]]] = ACCURACY

    @dataclass
    class Config(Adversarial):
        # Sec. 3 sums over the blocks' heads.
        heads: Literal["mean", "sum"] = "sum"
        # Of the teacher: all, half (up to the middle one) or middle.
        blocks: Blocks = "all"
        # Of the log-normal level real and generated data are judged at; see timesteps.py.
        time_mean: float = 1.0
        time_std: float = 1.0
        # Iterations per student update.
        student_every: int = 1
        # Of its few-step grid, or drawn from a density.
        student_times: Literal["grid", "density"] = "grid"
        # Share of student times at pure noise.
        first_weight: float = 0.7
        # Iterations before which a grid's less noisy half alone is trained.
        warmup: int = 500
        # For density: SANA-Sprint's 0.2, stated for data of deviation 0.5.
        student_mean: float = 0.893
        student_std: float = 1.6
        # Real data under another sample's condition count as fake.
        misaligned: bool = False

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        channels = [*chosen_blocks(teacher, self.config.blocks).values()]
        return {"discriminator": Discriminator(channels, kernel=self.config.head_kernel)}

    def phases(self, step: int) -> Iterator[Phase]:
        warm = step < self.config.warmup
        if step % self.config.student_every == 0:
            loss = functools.partial(self.student_loss, warm=warm)
            yield Phase("student", ("student",), ((1.0, loss),))
        loss = functools.partial(self.discriminator_loss, warm=warm)
        yield Phase("discriminator", ("discriminator",), ((1.0, loss),))

    def times(self, nets: Networks, batch: Batch, warm: bool = False) -> Tensor:
        """Student times (B,): the first with probability `first_weight`, else one of the others (Sec. 3.3)."""
        config, schedule = self.config, nets.schedule
        grid = self.times_sampled(schedule)
        at_first = batch.generator.rand() < config.first_weight
        if config.student_times == "density":
            shape = config.student_mean, config.student_std, nets.sigma_data
            drawn = timesteps.lognormal(schedule, batch.generator, *shape)
        else:
            later = grid[len(grid) // 2 :] if warm else grid[1:] or grid
            later = torch.tensor(later, dtype=torch.float64, device=at_first.device)
            drawn = later[batch.generator.randint(0, len(later))]
            at_first &= not (warm and len(grid) > 1)
        return torch.where(at_first, grid[0], drawn)

    def times_sampled(self, schedule: Schedule) -> list[float]:
        """All times the student is sampled at, falling."""
        grids = (self.sampling.grid(schedule, count) for count in self.sampling.steps)
        return sorted({t for grid in grids for t in grid}, reverse=True)

    def generate(self, nets: Networks, batch: Batch, warm: bool) -> Tensor:
        """x_hat = G(x_t, t) from noised real data; from the sampler's own first input at its first time."""
        schedule, t, eps = nets.schedule, self.times(nets, batch, warm), batch.randn()
        x_t = schedule.add_noise(batch.x0, eps, t)
        time = self.times_sampled(schedule)[0]
        first = expand((t == time).double(), x_t) > 0
        x_t = torch.where(first, self.sampling.first_input(schedule, eps, time), x_t)
        return nets.student(x_t, t, batch.cond).x0

    def seen(self, nets: Networks, batch: Batch, x0: Tensor, cond: Cond) -> tuple:
        """(critic, x_tau): the discriminator bound to a fresh level tau, and x0 noised to it."""
        teacher = unwrap(nets.teacher).backbone()
        names = list(chosen_blocks(teacher, self.config.blocks))
        shape = self.config.time_mean, self.config.time_std, nets.sigma_data
        tau = timesteps.lognormal(nets.schedule, batch.generator, *shape)

        def critic(x: Tensor) -> Logits:
            return nets.discriminator(block_features(teacher, x, tau, cond, names))

        return critic, nets.schedule.add_noise(x0, batch.randn(), tau)

    def student_loss(self, nets: Networks, batch: Batch, warm: bool = False) -> Losses:
        x0 = self.generate(nets, batch, warm)
        critic, x_tau = self.seen(nets, batch, x0, batch.cond)
        fake, real = critic(x_tau), None
        if self.config.gan == "relativistic":
            critic, x_tau = self.seen(nets, batch, batch.x0, batch.cond)
            real = critic(x_tau)
        gan = generator_loss(self.config, fake, real)
        return {"total": gan, "gan": gan} | moments(x0) | moments(batch.x0, "teacher_")

    def discriminator_loss(self, nets: Networks, batch: Batch, warm: bool = False) -> Losses:
        with torch.no_grad():
            x0 = self.generate(nets, batch, warm)
        real, fake = (self.seen(nets, batch, each, batch.cond) for each in (batch.x0, x0))
        misaligned = None
        if self.config.misaligned and batch.cond is not None:
            if len(x0) < 2:
                raise UserError(
                    "method.misaligned needs another sample's condition: batches of 2 at least per process."
                )
            another = map_cond(lambda c: c.roll(1, 0), batch.cond)
            misaligned = self.seen(nets, batch, batch.x0, another)
        return discriminator_losses(self.config, real, fake, batch.randn, misaligned)
