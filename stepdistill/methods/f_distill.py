"""f-distill: one-step students by any f-divergence (Xu, Nie and Vahdat 2025, arXiv 2502.15681).

DMD2 descends the reverse KL, which forgives a student that misses modes. The gradient of any f-divergence
D_f(data || student) = E_student f(r), r = p_data / p_student, is DMD's times a weight of the density ratio:

    grad = E_t,eps [ h(r(x_t)) (s_fake(x_t) - s_teacher(x_t))^T dx_t/dtheta ],    h(r) = f''(r) r^2

    divergence          f(r)                           h(r)
    reverse_kl          -log r                         1            DMD2 itself
    softened_kl         (r + 1) log((r + 1) / 2r)      1 / (r + 1)
    jensen_shannon      r log r - (r + 1) log((r + 1) / 2)          r / (r + 1)
    hellinger           1 - sqrt(r)                    sqrt(r) / 4
    forward_kl          r log r                        r
    jeffreys            (r - 1) log r                  r + 1
    neyman              (r - 1)^2 / r                  2 / r

A weight that grows with r listens to samples the data finds likely: those divergences cover modes and have
more variance. r comes for free from DMD2's discriminator, r = exp(logit), at the x_t the scores are asked at.
Since E_student r = 1 at every noise level, the ratios are divided by their mean: of the batch, or with `time_bins` by a
running one of each part of the noise levels, as the published code does; then the weights by theirs, so that the
learning rate means the same for all. Needs real images.

Normal ranges are DMD2's; "weight_max" (largest over mean weight) in the hundreds means that single samples
rule, and "accuracy" of 1 that the discriminator has won and r says nothing: lower gan_critic_weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.discriminator import Logits, logit
from stepdistill.errors import UserError
from stepdistill.methods.base import Networks
from stepdistill.methods.dmd2 import DMD2
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow

Divergence = Literal[
    "reverse_kl", "softened_kl", "jensen_shannon", "hellinger", "forward_kl", "jeffreys", "neyman"
]
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: r**0,
    "softened_kl": lambda r: 1 / (r + 1),
    "jensen_shannon": lambda r: r / (r + 1),
    "hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: r + 1,
    "neyman": lambda r: 2 / r,
}


def weighable(divergence: Divergence, count: int) -> None:
    """UserError where `count` samples of a pass cannot be weighed against one another."""
    if count < 2 and divergence != "reverse_kl":
        raise UserError(
            f"method.divergence={divergence} weighs the samples of a pass against their mean, and one of one sample weighs 1; set"
            " optim.micro_batch_size to at least 2, better 8 or more."
        )


class FDistill(DMD2):
    @dataclass
    class Config(DMD2.Config):
        divergence: Divergence = "jensen_shannon"
        # r is clipped to this range before anything else.
        ratio_low: float = 0.1
        ratio_high: float = 20.0
        # Ratios and weights by their means.
        normalise_weight: bool = True
        # Parts of the noise levels, even in flow's time, with a running mean of the ratio each; 0 = the batch's alone.
        time_bins: int = 0
        # Of those means.
        bin_decay: float = 0.99
        gan_weight: float = 1e-3

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.gan_weight <= 0:
            raise UserError(
                f"method.gan_weight={config.gan_weight:g}: f_distill takes its density ratio from the"
                " discriminator; set it above 0."
            )
        if not 0 < config.ratio_low < config.ratio_high:
            raise UserError(
                "method.ratio_low and method.ratio_high must be positive and rising,"
                f" got {config.ratio_low:g} and {config.ratio_high:g}."
            )
        if config.time_bins < 0 or not 0 <= config.bin_decay < 1:
            raise UserError(
                "method.time_bins must be at least 0 and method.bin_decay at least 0 and below 1,"
                f" got {config.time_bins} and {config.bin_decay:g}."
            )
        # Of no ratio yet.
        self._means = torch.zeros(config.time_bins, dtype=torch.float64)

    def weight(self, real: Prediction, logits: Logits | None) -> Tensor:
        """h(r) at the diffused samples, (B,), a constant."""
        config = self.config
        ratio = self.log_ratio(real, logits).exp().clamp(config.ratio_low, config.ratio_high)
        if config.normalise_weight:
            weighable(config.divergence, len(ratio))
            ratio = ratio / self.mean(real, ratio)
        weight = WEIGHTS[config.divergence](ratio)
        return weight / weight.mean() if config.normalise_weight else weight

    def mean(self, real: Prediction, ratio: Tensor) -> Tensor:
        """What each ratio is divided by: the batch's mean, or that of its part of the noise levels so far."""
        bins = self.config.time_bins
        if not bins:
            return ratio.mean()
        level = Flow().t_of_rho(real.schedule.rho(real.t)).to(ratio.device)
        part = (level * bins).long().clamp(max=bins - 1)
        inside = part[:, None] == torch.arange(bins, device=ratio.device)
        count = inside.sum(0)
        now = (inside * ratio.double()[:, None]).sum(0) / count.clamp(min=1)
        before = self._means.to(ratio.device)
        blended = torch.where(before > 0, now + (before - now) * self.config.bin_decay, now)
        self._means = torch.where(count > 0, blended, before)
        return self._means.to(ratio)[part]

    def averaged(self, nets: Networks, average: Callable[[Tensor], Tensor]) -> None:
        # Of those processes that have met a part.
        known = average((self._means > 0).double())
        self._means = average(self._means) / known.clamp(min=1e-12)

    def state_dict(self) -> dict[str, Any]:
        return {"ratio_means": self._means.tolist()} if self.config.time_bins else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "ratio_means" in state:
            self._means = torch.tensor(state["ratio_means"], dtype=torch.float64)

    def log_ratio(self, real: Prediction, logits: Logits) -> Tensor:
        """log p_data / p_student at (x_t, t), which is what an optimal discriminator's logit is; (B,)."""
        return logit(logits).detach()
