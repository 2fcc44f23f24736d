"""DMD: distribution matching distillation (Yin et al. 2023, arXiv 2311.18828).

A one-step student G descends the reverse KL between its diffused law and the data's, whose gradient two
denoisers give: mu_fake, trained by denoising on what G makes now, and the frozen, guided teacher mu_real:

    grad = E_t,z,eps [ w_t alpha_t (s_fake(x_t) - s_real(x_t)) dG/dtheta ]                                  (Eq. 7)
    w_t = sigma_t^2 / alpha_t  *  1 / mean |x0 - mu_real(x_t)|                                              (Eq. 8)

In x0-space that is (mu_fake - mu_real) / mean |x0 - mu_real|, times alpha_t, which is left out here.

The KL alone may drop modes, so G is also held to its teacher's own trajectories, computed once:

    L_reg = l(G(z_ref), y_ref),   y_ref the end of the guided teacher's ODE from z_ref                      (Eq. 9)

weighted by 0.25. The paper's l is LPIPS; here it is the mean square in x0-space, which needs no network.
regression_weight = 0 leaves the pairs out; no images are needed either way. DMD2 drops the pairs for two time
scales and a GAN.

Normal ranges: "gap" falls, x0_std stays near teacher_x0_std; "regression" falls to a floor above 0,
since the student is not the teacher's map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepdistill.losses import distribution_matching, mse
from stepdistill.methods.base import Batch, Losses, Networks, PairSettings, Phase
from stepdistill.methods.score import ScoreDistillation, compared
from stepdistill.schedule import Schedule, times_like


class DMD(ScoreDistillation):
    @dataclass
    class Config(ScoreDistillation.Config):
        t_low: float = 0.02
        t_high: float = 0.98
        # Eq. 8's mean |x0 - mu_real|; off in few dimensions.
        normalise: bool = True
        # Of L_reg; 0 = no pairs.
        regression_weight: float = 0.25
        pair_count: int = 10_000
        # DDIM steps of the teacher for each.
        pair_steps: int = 50

    def pairs(self, schedule: Schedule) -> PairSettings | None:
        config = self.config
        if config.regression_weight == 0:
            return None
        return PairSettings(config.pair_count, config.pair_steps, config.guidance_scale)

    def phases(self, step: int) -> Iterator[Phase]:
        for phase in super().phases(step):
            if phase.name == "student" and self.config.regression_weight:
                terms = (*phase.terms, (self.config.regression_weight, self.regression_loss))
                phase = Phase(phase.name, phase.trains, terms)
            yield phase

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        x0, _, told = self.generate(nets, batch)
        # The scores are constants.
        with torch.no_grad():
            real, fake = self.ask(nets, batch, x0, **told)
        matching = distribution_matching(x0, real.x0, fake.x0, self.config.normalise)
        return {"total": matching, "matching": matching} | compared(x0, real, fake)

    def regression_loss(self, nets: Networks, batch: Batch) -> Losses:
        """Eq. 9, at the first time of the student's sampling."""
        pairs, sampling = batch.pairs, self.sampling
        first = sampling.grid(nets.schedule, max(sampling.steps))[0]
        x_t = sampling.first_input(nets.schedule, pairs.z, first)
        x0 = nets.student(x_t, times_like(first, x_t), pairs.cond).x0
        loss = mse(x0, pairs.x0)
        return {"total": loss, "regression": loss}
