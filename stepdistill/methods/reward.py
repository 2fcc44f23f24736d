"""Reward feedback on a few-step student (ReFL, Xu et al. 2023, arXiv 2304.05977; as in Hyper-SD, arXiv 2404.13686).

A differentiable reward model r scores the student's decoded images, and its gradient is the teacher:

    roll the student out to a late one of its own steps, without gradient; one call with gradient gives x0
    loss         relu(margin - r(decode(x0), c))                                            (Hyper-SD, Sec. 3.2)

Where r has reached the margin the loss and its gradient are zero: what a reward is climbed for beyond that is
mostly its blind spots. A reward alone forgets what images look like; run it beside a distillation loss
(`compose`), for few iterations, or with `anchor_weight`, the squared distance to what the student said when
the stage began (not in the papers).

The student is rolled out by its own sampling, as the stage before taught it.

Normal ranges: "short", the share of samples below the margin, falls from 1 and need not reach 0; x0_std within half
and twice teacher_x0_std, what the student said when the stage began (with an anchor). When "score" rises and the
images get worse, the margin is too high.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn

from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.errors import UserError
from stepdistill.losses import moments, mse
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.registry import made, resolve
from stepdistill.rewards import REWARDS, RewardModel, scores
from stepdistill.rollout import simulate
from stepdistill.sampling import Sampling


class Reward(Method):
    needs_decoder = True

    @dataclass
    class Config:
        # A name in rewards.REWARDS, or with --allow-code my_module:MyReward.
        reward: str = "clip"
        # Of that class.
        arguments: dict[str, Any] = field(default_factory=dict)
        # No gradient where the score has reached it.
        margin: float = 1.0
        # Steps before this fraction of a rollout are not rewarded.
        late: float = 0.5
        anchor_weight: float = 0.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if not 0 <= config.late < 1:
            raise UserError(f"method.late must be at least 0 and below 1, got {config.late:g}.")
        self.cls = resolve(config.reward, REWARDS, "reward", where="method.reward")
        self._model: RewardModel | None = None

    @property
    def model(self) -> RewardModel:
        """Made when it is first asked: a recipe is checked without loading it."""
        if self._model is None:
            self._model = made(self.cls, self.config.arguments, self.config.reward)
        return self._model

    @property
    def trained_on(self) -> tuple[str, ...]:
        return (self.model.directory,) if self.model.directory else ()

    @property
    def needs_captions(self) -> bool:
        return self.cls.reads_captions

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"start": unwrap(student).clone()} if self.config.anchor_weight > 0 else {}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        config = self.config
        x_t, t, _ = simulate(self.sampling, nets, batch, late=config.late)
        x0 = nets.student(x_t, t, batch.cond).x0
        score = scores(self.model, config.reward, nets.decode(x0), batch.prompts)
        loss = nnf.relu(config.margin - score)
        losses = {"total": loss, "reward": loss, "score": score, "short": (score < config.margin).float()}
        if config.anchor_weight > 0:
            with torch.no_grad():
                start = nets.start(x_t, t, batch.cond).x0
            losses["anchor"] = mse(x0, start)
            losses["total"] = loss + config.anchor_weight * losses["anchor"]
            losses |= moments(start, "teacher_")
        return losses | moments(x0)
