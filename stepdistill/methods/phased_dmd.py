"""Phased DMD: distribution matching in intervals of noise (arXiv 2510.27684): later phases cannot undo what earlier ones drew.

A few-step student's steps are dealt to `phases` in turn. A phase ends not at x0 but at a state x_s of noise s, where the next
one begins, and is matched there: diffused on, from s to t > s,

    x_t = a x_s + b eps,   a = alpha_t / alpha_s,  b^2 = sigma_t^2 - a^2 sigma_s^2

the teacher's score at t is known, and one fake score per phase learns its own. No x0 belongs to x_s, but a pair does
whose denoising has the right minimum, since the score of x_t given x_s is -eps / b:

    eps' = sigma_t eps / b,    x0' = (x_t - sigma_t eps') / alpha_t                                 (in flow's terms in the paper)

To take the student's x0 and fresh noise instead is biased. The pair's variance grows without bound as t nears s, so its error
has the weight b^2 / sigma_t^2, 1 where s = 0. Levels of noise are drawn as by all methods, between none and all of it, and brought
between s and all in flow's time: t = s + (1 - s) drawn. One network serves all phases here; the paper has one, or a LoRA, for
each. Only the first phase decides the layout, which is what keeps seeds apart.

Normal ranges: those of score.py, over the phases in turn; "denoising_0" and on are the phases' own, each of another size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, guided, unwrap
from stepdistill.errors import UserError
from stepdistill.losses import distribution_matching
from stepdistill.methods.base import Batch, Losses, Networks, Phase
from stepdistill.methods.score import ScoreDistillation, compared
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, Schedule, expand, times_like


class Onward(NamedTuple):
    """x_t (B, ...) at t (B,), the pair x0', eps' whose denoising learns its score, and the weight (B,) of that error."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    weight: Tensor


class PhasedDMD(ScoreDistillation):
    rules = ("ode",)

    @dataclass
    class Config(ScoreDistillation.Config):
        student_every: int = 5
        guidance_scale: float = 1.75
        # Of noise; steps are dealt to them as evenly as can be.
        phases: int = 2
        # As in DMD2.
        normalise: bool = True

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling or Sampling.of((max(config.phases, 1),), self.sampled(config)))
        steps = self.sampling.steps
        if len(steps) != 1 or not 1 <= config.phases <= steps[0]:
            raise UserError(
                f"method.phases={config.phases} deals out the steps of one number of them, as many at least; got"
                f" student.steps={list(steps)}."
            )
        for name in ("diversity_weight", "shared_samples", "carry_fake_score", "tell_place"):
            if getattr(config, name):
                raise UserError(f"method.{name} is for methods that end at x0 in every step; leave it out.")
        if config.simulated != "states":
            raise UserError(
                f"method.simulated={config.simulated} chooses among numbers of steps, and this method's student has one, whose"
                " phases take turns; leave it out."
            )
        bounds = [k * steps[0] // config.phases for k in range(config.phases + 1)]
        # Places in the grid, by phase.
        self.places = [range(low, high) for low, high in itertools.pairwise(bounds)]

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode"}

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        each = super().networks
        return {_fake(k): each(teacher, student)["fake_score"] for k in range(self.config.phases)}

    def phases(self, step: int) -> Iterator[Phase]:
        k = step // self.config.student_every % self.config.phases
        for phase in super().phases(step):
            trains = phase.trains if phase.name == "student" else (_fake(k),)
            loss = self.student_loss if phase.name == "student" else self.critic_loss
            yield Phase(phase.name, trains, ((1.0, partial(loss, phase=k)),))

    def end(self, schedule: Schedule, phase: int) -> float:
        """s, where the phase ends: the next one's first time, and for the last no noise at all."""
        grid = self.sampling.grid(schedule, self.sampling.steps[0])
        return grid[self.places[phase].stop] if phase + 1 < self.config.phases else schedule.t_min

    def answer(self, nets: Networks, batch: Batch, phase: int) -> tuple[Prediction, Tensor]:
        """The student's prediction at one of its own states in this phase, and x_s, which the line of it ends at."""
        places = self.places[phase]
        grid = self.sampling.grid(nets.schedule, self.sampling.steps[0])
        grid = grid[: batch.generator.shared_randint(places.start, places.stop) + 1]
        with torch.no_grad():
            x = self.sampling.first_input(nets.schedule, batch.randn(), grid[0])
            x = self.sampling.walk(nets.student, x, grid, lambda _: torch.zeros_like(x), batch.cond)
        said = nets.student(x, times_like(grid[-1], x), batch.cond)
        last = phase + 1 == self.config.phases
        return said, said.x0 if last else said.at(times_like(self.end(nets.schedule, phase), x))

    def onward(self, schedule: Schedule, x_s: Tensor, eps: Tensor, s: Tensor | None, t: Tensor) -> Onward:
        """x_s diffused on to a drawn t, brought above s in flow's time; s (B,), None = no noise yet."""
        rho_s = torch.zeros_like(t) if s is None else schedule.rho(s)
        alpha_s = torch.ones_like(t) if s is None else schedule.alpha(s)
        if s is not None:
            flow = Flow()
            low, share = flow.t_of_rho(rho_s), flow.t_of_rho(schedule.rho(t))
            t = schedule.t_of_rho(flow.rho(low + (1 - low) * share))
            t = t.ceil() if schedule.discrete else t
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        b = (sigma**2 - (alpha * rho_s) ** 2).clamp(min=1e-12).sqrt()
        x_t = expand(alpha / alpha_s, x_s) * x_s + expand(b, x_s) * eps
        x0 = x_s / expand(alpha_s, x_s) - expand(alpha * rho_s**2 / b, x_s) * eps
        return Onward(x_t, t, x0, expand(sigma / b, x_s) * eps, (b / sigma) ** 2)

    def student_loss(self, nets: Networks, batch: Batch, phase: int = 0) -> Losses:
        said, x_s = self.answer(nets, batch, phase)
        with torch.no_grad():
            t = self.times(nets, batch, self.config.t_low, self.config.t_high)
            at = self.onward(nets.schedule, x_s, batch.randn(), self.start(nets.schedule, phase, t), t)
            real = self.teacher_at(nets, batch, at.x_t, at.t)
            fake = self.fake_at(_of_phase(nets, phase), batch, at.x_t, at.t)
        matching = distribution_matching(x_s, real.x0, fake.x0, self.config.normalise, answer=said.x0)
        return {"total": matching, "matching": matching} | compared(said.x0, real, fake)

    def critic_loss(self, nets: Networks, batch: Batch, phase: int = 0) -> Losses:
        config, fake = self.config, _of_phase(nets, phase).fake_score
        with torch.no_grad():
            _, x_s = self.answer(nets, batch, phase)
        t, eps = self.critic_times(nets, batch), batch.randn()
        at = self.onward(nets.schedule, x_s, eps, self.start(nets.schedule, phase, t), t)
        batch = replace(batch, cond=batch.dropped_cond(config.critic_dropout))
        # Of a condition that was dropped the guided answer is the unconditional one.
        said = guided(fake, at.x_t, at.t, batch.cond, batch.uncond, config.critic_guidance_scale)
        error = self.critic_error(said, at.x0, at.eps, unwrap(fake).sigma_data)
        loss = at.weight.to(error) * error
        return {"total": loss, f"denoising_{phase}": loss}

    def start(self, schedule: Schedule, phase: int, like: Tensor) -> Tensor | None:
        """s as times like `like` (B,), None where the phase ends without noise."""
        return None if phase + 1 == self.config.phases else torch.full_like(like, self.end(schedule, phase))


def _fake(phase: int) -> str:
    """The name of a phase's fake score."""
    return f"fake_score_{phase}" if phase else "fake_score"


def _of_phase(nets: Networks, phase: int) -> Networks:
    """The networks with this phase's fake score as the fake score."""
    return Networks(nets.modules | {"fake_score": nets.modules[_fake(phase)]}, nets.schedule, nets.decode)
