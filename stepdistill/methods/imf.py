"""iMF: improved MeanFlow, a flow map of any number of steps whose guidance is an input (Geng et al. 2025, arXiv 2512.02012).

MeanFlow (stepdistill/methods/meanflow.py) differentiates u along eps - x0, which no network can know from x_t: from data
alone its target has that noise in it. Here the identity is read as a prediction of the velocity,

    V = u + (t - r) sg(du/dt),  du/dt along (v^, dt = 1, dr = 0)
    loss   w |V - sg(v_g)|^2,   w = sg 1 / (|.|^2 + c),

and v^ is the network's own velocity, its average over no time, u(x_t, t, t); with a teacher it is the teacher's. (The
authors' code has a second head for v^; this is their variant without one.) Guidance is inside, told as omega:

    data      v_g = v + (1 - 1 / omega) (u_c - u_no),  omega told to u_c: at the optimum u_no + omega (v - u_no)
    teacher   v_g = v_no + omega (v_c - v_no)

omega is log-uniform between two ends, 1 outside of [interval_low, interval_high] of flow's time and where the condition is
dropped. The interval is the run's own; the authors tell the network that as well.

Normal ranges are MeanFlow's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.methods.base import Batch, Networks, guided_teacher
from stepdistill.methods.meanflow import ENDS, MeanFlow, Point
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, expand


class IMF(MeanFlow):
    @dataclass
    class Config(MeanFlow.Config):
        direction: Literal["teacher", "data"] = "data"
        # Of omega.
        guidance_low: float = 1.0
        guidance_high: float = 8.0
        # omega is an input of the student; false is for networks that take none, with one omega.
        tell_guidance: bool = True
        # Flow times where omega counts.
        interval_low: float = 0.0
        interval_high: float = 1.0
        equal_share: float = 0.5
        weight_c: float = 1e-2

        def __post_init__(self) -> None:
            super().__post_init__()
            # `sampled` takes their root.
            if not 0 < self.guidance_low <= self.guidance_high:
                raise ValueError(
                    "guidance_low must be above 0 and at most guidance_high,"
                    f" got {self.guidance_low:g} and {self.guidance_high:g}."
                )

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        low, high = config.guidance_low, config.guidance_high
        if not 0 <= config.interval_low < config.interval_high <= 1:
            raise UserError(
                "method.interval_low and method.interval_high must be flow times from 0 to 1 in rising order,"
                f" got {config.interval_low:g} and {config.interval_high:g}."
            )
        if config.guidance_scale != 1 or config.kappa != 0:
            raise UserError(
                "method.guidance_scale and method.kappa are meanflow's; here give method.guidance_low and"
                " method.guidance_high."
            )
        if not config.tell_guidance and low != high:
            raise UserError(
                f"method.tell_guidance=false is for one scale; give method.guidance_low and method.guidance_high alike, not"
                f" {low:g} and {high:g}."
            )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        how = {"rule": "flowmap", "inputs": (ENDS[config.end_by],)}
        if not config.tell_guidance:
            return how
        scale = math.sqrt(config.guidance_low * config.guidance_high)
        return how | {"inputs": ("guidance", *how["inputs"]), "guidance": "input", "scale": scale}

    def told(self, batch: Batch) -> dict[str, Tensor]:
        return {"guidance": self.omega(batch)} if self.config.tell_guidance else {}

    def omega(self, batch: Batch) -> Tensor:
        """Log-uniform, (B,)."""
        low, high = math.log(self.config.guidance_low), math.log(self.config.guidance_high)
        return (low + (high - low) * batch.generator.rand()).exp()

    def along(self, nets: Networks, at: Point, v: Tensor) -> Tensor:
        return v if self.config.direction == "teacher" else self.own_velocity(nets, at, at.cond)

    def velocity(self, nets: Networks, batch: Batch, at: Point) -> Tensor:
        config = self.config
        inside = (at.t >= config.interval_low) & (at.t <= config.interval_high) & ~at.dropped
        told = at.told.get("guidance", torch.full_like(at.t, config.guidance_high))
        omega = torch.where(inside, told, 1.0)
        # By the settings, not by what was drawn: every process makes the same passes, as shards need.
        unguided = batch.uncond is None or config.guidance_low == config.guidance_high == 1
        if config.direction == "teacher":
            asked = guided_teacher(nets, batch, 1 if unguided else omega, Flow())
            return asked(at.x_t, at.t).flow.to(at.x_t.dtype)
        v = at.eps - batch.x0
        if unguided:
            return v
        with_, without = (self.own_velocity(nets, at, cond) for cond in (batch.cond, batch.uncond))
        return v + expand(1 - 1 / omega, v) * (with_ - without)
