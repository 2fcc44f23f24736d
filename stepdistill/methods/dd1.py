"""DD1: Distilled Decoding of an autoregressive image model (Liu et al. 2024, arXiv 2412.17153).

The flow from noise to codes (`stepdistill.code_flow`), one place after another, makes what the teacher draws a function of
noise: eps_1 .. eps_L -> q_1 .. q_L, where q_i hangs on eps_1 .. eps_i. The student, the same causal network with the noise
as input, learns that function in one pass. In two passes it keeps the first places of its answer, and says the others again
from their own noise:

    x_i = q_i for i < k, eps_i behind;   minimise over i >= k   CE(logits_i, q_i) + w |z_i - q_i|^2

k is 0 or where a pass begins, q and eps are pairs of the teacher's, computed once, and no image is needed. z_i is the mean
of the logits' codes and a vector of its own. An answer drawn code by code without the noise would be right at each place
and fit nowhere: half of the images of two tokens that must agree would cross.

Normal ranges: "agreement", the share of codes that are the map's, rises; that of a student of the embedded teacher ends
near what `docs/distilled_decoding.md` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.denoiser import unwrap
from stepdistill.losses import moments
from stepdistill.methods.base import Batch, Losses, Networks, Phase
from stepdistill.methods.kd import KD


class DD1(KD):
    for_codes = True
    rules: ClassVar[tuple[str, ...]] = ("ode", "renoise")

    @dataclass
    class Config:
        # Of the teacher, on its logits; 1 = off.
        guidance_scale: float = 1.0
        pair_count: int = 50_000
        # Of |z - q|^2.
        vector_weight: float = 1.0

        @property
        def pair_steps(self) -> int:
            """The map is exact in one: every place is a pass of the teacher's all the same."""
            return 1

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        # The noise behind what is kept stays.
        return {"rule": "ode"}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        pairs, times = batch.pairs, self.times(nets.schedule)
        chosen = batch.generator.randint(0, len(times)).to(pairs.z.device)
        t = torch.tensor(times, dtype=torch.float64, device=pairs.z.device)[chosen]
        said = nets.student(nets.schedule.add_noise(pairs.x0, pairs.z, t), t, pairs.cond)
        right = unwrap(nets.student).network.nearest(pairs.x0)
        entropy = F.cross_entropy(said.logits.mT, right, reduction="none")
        squared = (said.vectors - pairs.x0).square().mean(-1)
        each = over(said.noisy, entropy + self.config.vector_weight * squared)
        agreement = over(said.noisy, (said.logits.argmax(-1) == right).float())
        return {
            "total": each,
            "entropy": over(said.noisy, entropy),
            "squared": over(said.noisy, squared),
            "agreement": agreement.detach(),
        } | moments(said.x0)


def over(places: Tensor, values: Tensor) -> Tensor:
    """The mean (B,) of values (B, L) over the places that count (B, L)."""
    return (values * places).sum(1) / places.sum(1).clamp(min=1)
