"""Decoupled DMD (arXiv 2511.22677): guidance is the engine, distribution matching the brake.

DMD's direction under guidance a, teacher - fake with a guided teacher, is a sum of two that do different work:

    CA   a ( teacher(x_tau, c) - teacher(x_tau, no c) )       what makes few steps sharp; has no fixed point
    DM   teacher(x_tau, c) - fake(x_tau, c)                   unguided, what keeps the student a distribution

each with a re-noising time tau of its own. CA's stays below the student's time t, where the image is still being
decided; DM's covers all noise. For x0 the student's answer and D either direction, each is the gradient of

    | x0 - sg( x0 + D / n ) |^2 / 2,   n = mean |teacher(x_tau, c) - x0|, at least `floor`

The fake score learns by denoising and is drawn a little towards the student after every update (`critic_pull`).
CA is the same however far the student has gone: what it adds up to, augmentation times learning rate times updates,
decides how saturated the images are, and no loss shows it.

Times of CA are flow's, t = rho / (1 + rho), whatever the schedule. Where there are no conditions there is no CA.

Normal ranges: "gap" falls; "norm" is n; "agreement", the cosine of the two, is near 0. "balance", the size of DM beside CA's, is
about 1 where the student rests, for there they cancel. Far below CA runs away and images saturate, and x0_std does not tell:
what the teacher answers to such images is as wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.ema import track_average
from stepdistill.errors import UserError
from stepdistill.losses import displaced
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.ranges import SCORES
from stepdistill.methods.score import Made, ScoreDistillation, compared
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, Schedule


class DecoupledDMD(ScoreDistillation):
    # Healthy 1.2 to 1.9 (decoupled_dmd and cdm); with ten times the augmentation at most 0.3 (benchmarks/health.json).
    health: ClassVar[dict[str, tuple[float, float, str]]] = SCORES | {
        "student/balance_recent": (
            0.5,
            10.0,
            "below, guidance outruns distribution matching and images saturate: lower method.augmentation or"
            " optim.student.lr; above, there is next to no guidance: raise method.augmentation",
        )
    }

    @dataclass
    class Config(ScoreDistillation.Config):
        student_every: int = 5
        # a, of CA; guidance_scale is DM's.
        augmentation: float = 7.0
        # Of DM's noise levels.
        t_low: float = 0.02
        t_high: float = 0.98
        # Of n, in units of x0.
        floor: float = 0.1
        # Share of the student in the fake score's weights after each student update; 0 = none.
        critic_pull: float = 1e-3

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.augmentation < 0:
            raise UserError(f"method.augmentation must be at least 0, got {config.augmentation:g}.")
        if config.floor <= 0:
            raise UserError(f"method.floor must be above 0, got {config.floor:g}.")
        if config.tell_place and config.critic_pull:
            raise UserError(
                "method.tell_place=true makes the fake score another network than the student is; set"
                " method.critic_pull to 0."
            )
        if not 0 <= config.critic_pull < 1:
            raise UserError(f"method.critic_pull must be at least 0 and below 1, got {config.critic_pull:g}.")

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        made = super().networks(teacher, student)
        ours, theirs = (
            {k: v.shape for k, v in net.state_dict().items()} for net in (unwrap(student), made["fake_score"])
        )
        if self.config.critic_pull and ours != theirs:
            raise UserError(
                f"method.critic_pull={self.config.critic_pull:g}: the fake score is of another make than the student, so"
                " it cannot be drawn towards it; set method.critic_pull to 0."
            )
        return made

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        if self.config.critic_pull and "student" in ran:
            track_average(nets.fake_score, nets.student, 1 - self.config.critic_pull)

    def guidance(self, batch: Batch) -> float:
        # CA and DM together are DMD's direction under this.
        return self.config.guidance_scale + (self.config.augmentation if batch.uncond is not None else 0)

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        return self.at_anchor(nets, batch)[0]

    def at_anchor(self, nets: Networks, batch: Batch) -> tuple[Losses, Prediction]:
        """DM and CA at one of the student's own states, and its answer there."""
        x_t, t = self.anchor(nets, batch)
        said = nets.student(x_t, t, batch.cond)
        self.kept(batch, Made(said.x0, batch.cond, self.told(t)))
        losses, pull = self.matching(nets, batch, said.x0, t)
        if self.config.augmentation and batch.uncond is not None:
            direction, losses["augmentation"] = self.augmentation(nets, batch, said.x0, t)
            losses["total"] = losses["total"] + losses["augmentation"]
            both = pull.flatten(1), direction.flatten(1)
            losses["agreement"] = torch.cosine_similarity(*both)
            losses["balance"] = both[0].norm(dim=1) / both[1].norm(dim=1).clamp(min=1e-12)
        return losses, said

    def matching(self, nets: Networks, batch: Batch, x0: Tensor, t: Tensor) -> tuple[Losses, Tensor]:
        """DM at x0, the student's answer at t (B,), as losses and as its direction."""
        with torch.no_grad():
            real, fake = self.ask(nets, batch, x0, **self.told(t))
        pull = real.x0 - fake.x0
        norm = self.scale(x0, real.x0)
        loss = displaced(x0, pull, norm)
        return {"total": loss, "matching": loss, "norm": norm} | compared(x0, real, fake), pull

    def augmentation(self, nets: Networks, batch: Batch, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """CA's direction at x0, and its loss."""
        schedule = nets.schedule
        with torch.no_grad():
            tau = earlier(schedule, t, batch.generator.rand())
            x_tau = schedule.add_noise(x0, batch.randn(), tau)
            told, untold = (nets.teacher(x_tau, tau, cond).x0 for cond in (batch.cond, batch.uncond))
            direction = self.config.augmentation * (told - untold)
        return direction, displaced(x0, direction, self.scale(x0, told))

    def scale(self, x0: Tensor, real_x0: Tensor) -> Tensor:
        """n, (B,)."""
        return (x0.detach() - real_x0).abs().flatten(1).mean(1).clamp(min=self.config.floor)


def earlier(schedule: Schedule, t: Tensor, share: Tensor) -> Tensor:
    """The time at that share of t's flow time, (B,); whole under a table, where networks know no others."""
    flow = Flow()
    found = schedule.t_of_rho(flow.rho(share * flow.t_of_rho(schedule.rho(t))))
    return found.floor() if schedule.discrete else found
