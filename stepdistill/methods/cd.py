"""CD: consistency distillation (Song et al. 2023, "Consistency Models", arXiv 2303.01469).

A consistency function maps every point of a probability-flow ODE trajectory to the trajectory's beginning.
The student learns it from pairs of neighbours, the second made from the first by one step of the teacher:

    neighbours   x_s = x_t + one Heun step of dx/dt = (x - D(x, t)) / t, from t down to s          (Eq. 6, Alg. 2)
    boundary     f(x, t_min) = x                                                                    (Sec. 3)
    loss         w(t) d( f_theta(x_t, t), sg f_ema(x_s, s) )                                        (Eq. 7)

The paper weighs all links alike and likes LPIPS best for d (`distance: lpips`, of what the family decodes), whose
network is read from a file of one's own (stepdistill/lpips.py).
t and s are neighbours among `points` noise levels, even in rho^(1/7) (Karras et al. 2022, Eq. 5). Everything
runs in EDM's terms (alpha = 1, sigma = t): a network of another schedule is asked there at equal noise.

Real images say where trajectories are looked at; what they hold comes from the teacher alone.

Normal ranges: the loss is the error of one link of a chain of `points` links, so its size says nothing about the
samples. x0_std stays within a tenth of teacher_x0_std, here the target's; both falling well below the data's is
the student averaging over trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.jvp import same_draws
from stepdistill.lpips import LPIPS
from stepdistill.methods.base import Batch, Losses, Networks, consistency, guided_teacher
from stepdistill.methods.linked import Linked
from stepdistill.solvers import SOLVERS
from stepdistill.timesteps import as_edm


class CD(Linked):
    @dataclass
    class Config(Linked.Config):
        distance: Literal["l2", "pseudo_huber", "lpips"] = "l2"
        # A safetensors file.
        lpips_weights: str = ""
        # The paper's code has "average" on ImageNet and LSUN.
        lpips_pooling: Literal["max", "average"] = "max"
        # Noise levels, the paper's N (18 for CIFAR-10, 40 for ImageNet 64).
        points: int = 40
        # Of the teacher's step.
        solver: Literal["heun", "euler"] = "heun"
        # Of the teacher; 1 = off.
        guidance_scale: float = 1.0

        def __post_init__(self) -> None:
            if self.points < 2:
                raise ValueError(f"points must be at least 2, got {self.points}.")
            if bool(self.lpips_weights) != (self.distance == "lpips"):
                raise ValueError(
                    f"lpips_weights must name a file with distance=lpips and nothing otherwise, got {self.lpips_weights!r} with"
                    f" distance={self.distance}."
                )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "renoise", "first_rho": 80.0}

    @property
    def needs_decoder(self) -> bool:
        return self.config.distance == "lpips"

    @cached_property
    def lpips(self) -> LPIPS:
        """Made when it is first asked for. It is no network of the run, which are saved."""
        return LPIPS(self.config.lpips_weights, self.config.lpips_pooling)

    @property
    def trained_on(self) -> tuple[str, ...]:
        return (str(self.lpips.file),) if self.config.distance == "lpips" else ()

    def distance(self, nets: Networks, online: Tensor, target: Tensor) -> Tensor:
        if self.config.distance != "lpips":
            return super().distance(nets, online, target)
        return self.lpips.to(online.device)(nets.decode(online), nets.decode(target))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        config, frame = self.config, as_edm(nets.schedule)
        grid = frame.ode_grid(config.points - 1, "karras").to(batch.index.device)
        n = batch.generator.randint(0, config.points - 1)
        t, s = grid[n], grid[n + 1]
        x_t = frame.add_noise(batch.x0, batch.randn(), t)
        with torch.no_grad():
            teacher = guided_teacher(nets, batch, config.guidance_scale, frame)
            x_s = SOLVERS[config.solver](teacher, x_t, t, s).to(x_t.dtype)
            with same_draws(x_t):
                target = consistency(nets.target(x_s, s, batch.cond, in_schedule=frame))
        online = consistency(nets.student(x_t, t, batch.cond, in_schedule=frame))
        return self.linked(nets, online, target, frame, t, s)
