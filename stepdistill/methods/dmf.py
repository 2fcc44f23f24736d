"""DMF: a trained teacher turned into a flow map (decoupled MeanFlow, Lee et al. 2025, arXiv 2510.24474).

A denoiser's first half reads x_t, its second makes the answer of a noise level. Told the end r of a jump there, in the
place of t, a trained network is a two-time student with no new weight, and for r = t the teacher itself
(stepdistill/families/depth.py). Training is iMF's (stepdistill/methods/imf.py), half of it at r = t, with the loss

    log( |V - v|^2 / D / e^s + c ) + s = log( |V - v|^2 / D + c e^s ),    s(t) learned

so that every sample counts by the logarithm of its error. s only moves the floor c and has no rest: it falls, and in time no
floor is left. (Of images all err alike; in few dimensions those few that err more are the trajectories that part.
`weight_power` p below MeanFlow's 1 puts (x^(1-p) - 1) / (1-p) in the logarithm's place, whose slope is MeanFlow's weight; s
then rests at the logarithm of the mean error, and noise levels count alike. Of an exact teacher the error has no floor either:
levels that are learned well then outweigh those that are not, and without `learned_weight` the weight is iMF's.) t and r are
logit-normal each by itself, t the later of the two; where r = t another one. A network that is told the logarithm of its
noise knows r = 0, where the last jump ends, by the least r it was trained with alone: `end_mean` must reach there.

Normal ranges are MeanFlow's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill import timesteps
from stepdistill.denoiser import Denoiser
from stepdistill.methods.base import Batch, Networks, Phase
from stepdistill.methods.imf import IMF
from stepdistill.methods.meanflow import Point
from stepdistill.methods.scm import NoiseWeight
from stepdistill.schedule import Flow
from stepdistill.timesteps import as_edm


class DMF(IMF):
    @dataclass
    class Config(IMF.Config):
        direction: Literal["teacher", "data"] = "teacher"
        # The authors' 0.6 of the conditional in v + 0.6 (u_c - u_no) is an omega of 2.5, up to t = 0.7.
        guidance_low: float = 2.5
        guidance_high: float = 2.5
        tell_guidance: bool = False
        interval_high: float = 0.7
        end_by: Literal["embedding", "depth"] = "depth"
        time_mean: float = 0.4
        end_mean: float = -1.2
        # Of t where r = t.
        equal_mean: float = 0.0
        equal_std: float = 1.0
        # s(t); false = the weight of iMF.
        learned_weight: bool = True

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"weighting": NoiseWeight()} if self.config.learned_weight else {}

    def phases(self, step: int) -> Iterator[Phase]:
        trained = ("student", "weighting") if self.config.learned_weight else ("student",)
        yield Phase("student", trained, ((1.0, self.loss),))

    def times(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        t, r = super().times(nets, batch)
        config, frame = self.config, as_edm(nets.schedule, most=self.sampling.first_rho or 1e4)
        shape = config.equal_mean, config.equal_std, nets.sigma_data
        equal = Flow().t_of_rho(timesteps.lognormal(frame, batch.generator, *shape))
        return torch.where(t == r, equal, t), torch.where(t == r, equal, r)

    def weighed(self, nets: Networks, squared: Tensor, at: Point) -> Tensor:
        if not self.config.learned_weight:
            return super().weighed(nets, squared, at)
        s = nets.weighting(Flow().rho(at.t)).to(squared)
        error, power = (
            squared / at.x_t[0].numel() * (-s).exp() + self.config.weight_c,
            self.config.weight_power,
        )
        return (error.log() if power == 1 else (error ** (1 - power) - 1) / (1 - power)) + s
