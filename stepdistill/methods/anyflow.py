"""AnyFlow: a flow map taught on its own trajectories (arXiv 2605.13724), the stage after `meanflow`, `imf` or `dmf`.

A flow map learns from points on the data's trajectories; what it meets when it is sampled are its own. Here it jumps, with
gradient, through three of its own answers at most, and their end is matched to the teacher by DMD2
(stepdistill/methods/dmd2.py):

    rollout   N of student.steps, a place k of its grid;  1 -> t_k,  t_k -> t_k+1,  t_k+1 -> 0
    loss      DMD2 at the end  +  flow_map_weight  the flow map's own loss on data

One jump of any length and one fine step stand for the N steps between, so a thousand steps cost three calls. Where places
coincide, k = 0 or the last, there are two, and for N = 1 one. The fake score learns on the same rollouts without gradient;
with `tell_place` it is told where the last jump began.

`flow_map` holds the settings of that loss, those of `imf`; give the stage before's, and the student goes on as it was told.
Without images, flow_map_weight 0, it is the on-policy part alone.

Normal ranges are those of dmd2; "flow_map" stays as the stage before left it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from stepdistill.errors import UserError
from stepdistill.methods.base import Batch, Losses, Networks, Phase, addressed
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.imf import IMF
from stepdistill.methods.score import Made
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like


@dataclass
class FlowMap(IMF.Config):
    """iMF's settings as this stage has them, distilled and of one scale."""

    direction: Literal["teacher", "data"] = "teacher"
    guidance_high: float = 1.0
    tell_guidance: bool = False


class AnyFlow(DMD2):
    rules = ("flowmap",)

    @dataclass
    class Config(DMD2.Config):
        # lambda, of the flow map's loss.
        flow_map_weight: float = 1.0
        flow_map: FlowMap = field(default_factory=FlowMap)

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.flow_map.tell_guidance:
            raise UserError(
                "method.flow_map.tell_guidance: this stage is for one scale, method.guidance_scale; set it to false."
            )
        if config.diversity_weight:
            raise UserError(
                "method.diversity_weight: a flow map's first answer is where its own jump ends, not the anchor's; set it to 0."
            )
        if config.simulated != "states":
            raise UserError(
                f"method.simulated={config.simulated} chooses among states of the student's sampling, and this method draws the"
                " places of its jumps itself; leave it out."
            )
        with addressed("method.flow_map"):
            self.flow_map = IMF(config.flow_map, self.sampling)

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return IMF.sampled(config.flow_map)

    @property
    def needs_images(self) -> bool:
        return super().needs_images or self.config.flow_map_weight > 0

    def phases(self, step: int) -> Iterator[Phase]:
        for phase in super().phases(step):
            if phase.name == "student" and self.config.flow_map_weight:
                term = self.config.flow_map_weight, self.flow_map_loss
                phase = Phase(phase.name, phase.trains, (*phase.terms, term))
            yield phase

    def flow_map_loss(self, nets: Networks, batch: Batch) -> Losses:
        losses = self.flow_map.loss(nets, batch)
        return {"total": losses["total"], "flow_map": losses["total"].detach(), "error": losses["error"]}

    def generate(self, nets: Networks, batch: Batch) -> Made:
        """x0 by at most three jumps, each with gradient."""
        places = self.places(nets, batch)
        x = self.sampling.first_input(nets.schedule, batch.randn(), places[0])
        noise = torch.zeros_like(x)
        x0 = self.sampling.sample(
            nets.student, x, places, lambda _: noise, batch.cond, t_min=nets.schedule.t_min
        )
        return self.kept(batch, Made(x0, batch.cond, self.told(times_like(places[-1], x0))))

    def places(self, nets: Networks, batch: Batch) -> list[float]:
        """Times the student is asked at, falling, one draw for the whole global batch."""
        draw = batch.generator.shared_randint
        counts = self.sampling.steps
        grid = self.sampling.grid(nets.schedule, counts[draw(0, len(counts))])
        k = draw(0, len(grid))
        return sorted({grid[i] for i in (0, k, min(k + 1, len(grid) - 1))}, reverse=True)
