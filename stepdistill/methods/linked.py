"""Consistency along a chain of neighbours, each made from the one above by a step of the teacher: what CD, LCM and TSCD
share.

    loss   w(t, s) d( f_theta at t, sg f_ema at s ),   f_ema an average of the student, the target network

An f is the beginning of its trajectory, or where a segment of it ends: that is the method's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.ema import track_average
from stepdistill.losses import moments, mse, pseudo_huber
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.schedule import Schedule

LinkWeight = Literal["uniform", "inverse_gap"]


class Linked(Method):
    """Base of methods that link a point of the student's to its neighbour of the target network's, by `linked`."""

    needs_images = True

    @dataclass
    class Config:
        # d.
        distance: Literal["l2", "pseudo_huber"] = "l2"
        # Its c.
        huber_c: float = 1e-3
        # w, see `weigh_link`.
        link_weight: LinkWeight = "inverse_gap"
        # Of f_ema; 0 = the student itself.
        target_ema: float = 0.95

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"target": unwrap(student).clone()}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        track_average(nets.target, nets.student, self.config.target_ema)

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        raise NotImplementedError

    def distance(self, nets: Networks, online: Tensor, target: Tensor) -> Tensor:
        """d of two answers (B, ...), one per sample."""
        if self.config.distance == "l2":
            return mse(online, target)
        return pseudo_huber(online, target, self.config.huber_c)

    def linked(
        self, nets: Networks, online: Tensor, target: Tensor, schedule: Schedule, t: Tensor, s: Tensor
    ) -> Losses:
        """The loss of f_theta at t and f_ema at s, (B, ...) both, and what is logged beside it."""
        distance = self.distance(nets, online, target)
        losses = {"total": weigh_link(self.config.link_weight, schedule, t, s).to(distance) * distance}
        return losses | moments(online) | moments(target, "teacher_")


def weigh_link(kind: LinkWeight, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """(B,): 1, or 1 / (rho_t - rho_s) of the neighbours' noise levels, up to 80 as EDM's end.

    Every point of a trajectory inherits the errors of all links below it. A link of little noise moves its answer
    little, so under weight 1 its error is nothing beside those of much noise; divided by the gap, links count by
    what they err per noise (Song & Dhariwal 2023, arXiv 2310.14189, Sec. 3.1).
    """
    if kind == "uniform":
        return torch.ones_like(t)
    high, low = (schedule.rho(time).clamp(max=80.0) for time in (t, s))
    return 1 / (high - low).clamp(min=1e-3)
