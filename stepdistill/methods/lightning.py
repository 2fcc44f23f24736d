"""Lightning: progressive adversarial distillation (SDXL-Lightning, Lin et al. 2024, arXiv 2402.13929).

Progressive distillation with a discriminator in place of the squared error, which averages where one student step
cannot follow two, or eight, of the predecessor's:

    real       x_s = `ratio` DDIM steps of the predecessor from x_t,   t and s neighbours on the student's grid
    generated  x_s = one DDIM step of the student from the same x_t
    D          the teacher's encoder, trained along, looks at (x_t, t) and at (x_s, s); a head on both (Sec. 3.2)

Conditional on x_t, D asks that the student keep to the predecessor's trajectories; the unconditional D(x_s), run
after it, gives that up for sharpness where the student has not the capacity (Sec. 3.3). Non-saturating.

Stages are written as a recipe's `stages:`, one number of `student.steps` each: first from the guided teacher by
squared error alone (`predecessor: teacher`, `mse_weight: 1`, `gan_weight: 0`; the paper 128 -> 32), then
32 -> 8 -> 4 -> 2 -> 1, each conditional and then unconditional (`conditional: false`, `predecessor: same`). Each
stage starts from the student of the one before. Student and sampler are deterministic, and good for that number
of steps alone.

Normal ranges: "accuracy" of the discriminator between 0.5 and 0.9, of 1 when it wins; x0_std within half and twice
teacher_x0_std, here that of the data, and below it at times of much noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, guided, unwrap
from stepdistill.discriminator import (
    ACCURACY,
    Adversarial,
    Discriminator,
    Logits,
    discriminator_losses,
    generator_loss,
)
from stepdistill.errors import UserError
from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Schedule, expand


class Lightning(Method):
    needs_images = True
    rules = ("ode",)
    health: ClassVar[dict[str, tuple[float, float, str]]] = ACCURACY

    @dataclass
    class Config(Adversarial):
        gan: Literal["hinge", "non_saturating", "relativistic"] = "non_saturating"
        # Whose steps are matched: the guided teacher's, those of the student as it begins, or the predecessor's of
        # the stage before, which an unconditional stage goes on with.
        predecessor: Literal["teacher", "student", "same"] = "student"
        # Of the teacher, where it is the predecessor (paper: 6).
        guidance_scale: float = 1.0
        # Steps of the predecessor that one of the student's stands for.
        ratio: int = 2
        # D sees x_t too.
        conditional: bool = True
        gan_weight: float = 1.0
        # Of the squared error in x_s.
        mse_weight: float = 0.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        steps = self.sampling.steps
        if len(steps) > 1:
            raise UserError(
                f"student.steps must be one number per stage for lightning, got {list(steps)};"
                " write one of `stages:` for each."
            )
        if config.ratio < 1:
            raise UserError(f"method.ratio must be at least 1, got {config.ratio}.")
        if config.gan_weight <= 0 and config.mse_weight <= 0:
            raise UserError("method.gan_weight and method.mse_weight are both 0, so nothing would be learnt.")

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode"}

    @property
    def carried(self) -> tuple[str, ...]:
        return ("predecessor",) if self.config.predecessor == "same" else ()

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        config, made = self.config, {}
        if config.predecessor != "teacher":
            made["predecessor"] = unwrap(student).clone()
        if config.gan_weight > 0:
            made["encoder"] = teacher.encoder()
            channels = teacher.blocks[teacher.middle] * (1 + config.conditional)
            made["discriminator"] = Discriminator([channels], kernel=config.head_kernel)
        return made

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.student_loss),))
        if self.config.gan_weight > 0:
            yield Phase("discriminator", ("encoder", "discriminator"), ((1.0, self.discriminator_loss),))

    def start(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """Position i on the student's grid (B,), and x_t there from noised data."""
        (count,), schedule = self.sampling.steps, nets.schedule
        i = batch.generator.randint(0, count)
        t = torch.tensor(self.sampling.grid(schedule, count), dtype=torch.float64, device=i.device)[i]
        return i, schedule.add_noise(batch.x0, batch.randn(), t)

    def at(self, schedule: Schedule, i: Tensor, parts: int) -> Tensor:
        """Time number i (B,) of the grid of `parts` times the student's steps, ending at t_min."""
        grid = (*self.sampling.grid(schedule, parts * self.sampling.steps[0]), schedule.t_min)
        return torch.tensor(grid, dtype=torch.float64, device=i.device)[i]

    def move(self, prediction: Prediction, s: Tensor) -> Tensor:
        """x_s by DDIM; x0 itself at the end, as a sampler does."""
        last = expand(s, prediction.x_t) <= prediction.schedule.t_min
        return torch.where(last, prediction.x0, prediction.at(s))

    @torch.no_grad()
    def real(self, nets: Networks, batch: Batch, i: Tensor, x_t: Tensor) -> Tensor:
        """The predecessor's x_s."""
        config, x = self.config, x_t
        for k in range(config.ratio):
            t, s = (self.at(nets.schedule, config.ratio * i + j, config.ratio) for j in (k, k + 1))
            if config.predecessor != "teacher":
                said = nets.predecessor(x, t, batch.cond)
            else:
                said = guided(nets.teacher, x, t, batch.cond, batch.uncond, config.guidance_scale)
            x = self.move(said, s).to(x_t.dtype)
        return x

    def generate(self, nets: Networks, batch: Batch, i: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The student's x_s, and its x0."""
        said = nets.student(x_t, self.at(nets.schedule, i, 1), batch.cond)
        return self.move(said, self.at(nets.schedule, i + 1, 1)), said.x0

    def logits(self, nets: Networks, batch: Batch, i: Tensor, x_t: Tensor, x_s: Tensor) -> Logits:
        """D(x_s), or D(x_t, x_s): one encoder over both, their features side by side."""
        looks = [(x_s, self.at(nets.schedule, i + 1, 1))]
        if self.config.conditional:
            looks.append((x_t, self.at(nets.schedule, i, 1)))
        seen = [nets.encoder(x, t, batch.cond) for x, t in looks]
        return nets.discriminator([torch.cat(seen, 1 if seen[0].ndim != 3 else 2)])

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        i, x_t = self.start(nets, batch)
        x_s, x0 = self.generate(nets, batch, i, x_t)
        losses: Losses = {"total": torch.zeros(len(x_t), device=x_t.device)}
        needs_real = config.mse_weight > 0 or config.gan == "relativistic"
        real = self.real(nets, batch, i, x_t) if needs_real else None
        if config.mse_weight > 0:
            losses["error"] = mse(x_s, real)
            losses["total"] = losses["total"] + config.mse_weight * losses["error"]
        if config.gan_weight > 0:
            fake = self.logits(nets, batch, i, x_t, x_s)
            beside = self.logits(nets, batch, i, x_t, real) if config.gan == "relativistic" else None
            losses["gan"] = generator_loss(config, fake, beside)
            losses["total"] = losses["total"] + config.gan_weight * losses["gan"]
        return losses | moments(x0) | moments(batch.x0, "teacher_")

    def discriminator_loss(self, nets: Networks, batch: Batch) -> Losses:
        i, x_t = self.start(nets, batch)
        real = self.real(nets, batch, i, x_t)
        with torch.no_grad():
            fake, _ = self.generate(nets, batch, i, x_t)

        def critic(x_s: Tensor) -> Logits:
            return self.logits(nets, batch, i, x_t, x_s)

        return discriminator_losses(self.config, (critic, real), (critic, fake), batch.randn)
