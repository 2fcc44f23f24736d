"""The one conversion algebra: x0, eps, v, flow, F and score from any one of them.

With x_t = alpha x0 + sigma eps, a network's output of any kind names one straight line of (x0, eps) pairs:

    kind    output              x0
    x0      x0                  itself
    eps     eps                 (x_t - sigma eps) / alpha
    v       alpha eps - sigma x0, for alpha^2 + sigma^2 = 1; in general (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    flow    eps - x0            (x_t - sigma flow) / (alpha + sigma)
    F       (dx_t/dt) / sigma_data under TrigFlow     alpha x_t - sigma F
    score   grad log p_t(x_t)   (x_t + sigma^2 score) / alpha

No method contains eps algebra of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepdistill.schedule import Schedule, expand

KINDS = ("x0", "eps", "v", "flow", "F", "score")
# Of alpha as a divisor: from noise alone no eps tells x0.
_LEAST = 1e-4


def _kept(read: Callable[[Prediction], Tensor]) -> property:
    """A `cached_property` that does not keep what was read under no_grad where the prediction carries a gradient: the next
    reader would get it without.
    """
    name = read.__name__

    def get(self: Prediction) -> Tensor:
        if name in self.__dict__:
            return self.__dict__[name]
        value = read(self)
        if torch.is_grad_enabled() or not (self.raw.requires_grad or self.x_t.requires_grad):
            self.__dict__[name] = value
        return value

    return property(get, doc=read.__doc__)


@dataclass(frozen=True)
class Prediction:
    """What a denoiser said about `x_t`, readable as any quantity.

    raw: (B, ...) the network's output; kind: one of `KINDS`; x_t: (B, ...), t: (B,) in `schedule`.
    """

    raw: Tensor
    kind: str
    x_t: Tensor
    t: Tensor
    schedule: Schedule

    @cached_property
    def _alpha_sigma(self) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(self.t)
        return expand(alpha, self.x_t), expand(sigma, self.x_t)

    @property
    def _alpha(self) -> Tensor:
        return self._alpha_sigma[0]

    @property
    def _sigma(self) -> Tensor:
        return self._alpha_sigma[1]

    @_kept
    def x0(self) -> Tensor:
        """The clean-image estimate E[x0 | x_t] (for a student, its output)."""
        alpha, sigma, x_t, raw = self._alpha, self._sigma, self.x_t, self.raw
        if self.kind == "x0":
            return raw
        if self.kind == "eps":
            return (x_t - sigma * raw) / alpha.clamp(min=_LEAST)
        if self.kind == "v":
            return (alpha * x_t - sigma * raw) / (alpha**2 + sigma**2)
        if self.kind == "flow":
            return (x_t - sigma * raw) / (alpha + sigma)
        if self.kind == "F":
            _sigma_data(self.schedule)
            # cos(t) x_t - sin(t) sigma_data F.
            return alpha * x_t - sigma * raw
        if self.kind == "score":
            return (x_t + sigma**2 * raw) / alpha.clamp(min=_LEAST)
        raise ValueError(f"prediction kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    @_kept
    def eps(self) -> Tensor:
        """The unit noise estimate (x_t - alpha x0) / sigma, meaningless at sigma = 0."""
        # Only x0 itself is subtracted from x_t: at small sigma the difference loses every digit.
        if self.kind == "eps":
            return self.raw
        if self.kind == "v":
            return (self._sigma * self.x_t + self._alpha * self.raw) / (self._alpha**2 + self._sigma**2)
        if self.kind == "flow":
            return (self.x_t + self._alpha * self.raw) / (self._alpha + self._sigma)
        if self.kind == "F":
            return self._sigma * self.x_t / _sigma_data(self.schedule) ** 2 + self._alpha * self.raw
        if self.kind == "score":
            return -self._sigma * self.raw
        return (self.x_t - self._alpha * self.x0) / self._sigma.clamp(min=1e-8)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans & Ho 2022)."""
        return self.raw if self.kind == "v" else self._alpha * self.eps - self._sigma * self.x0

    @property
    def flow(self) -> Tensor:
        """eps - x0, the velocity of rectified flow."""
        return self.raw if self.kind == "flow" else self.eps - self.x0

    @property
    def score(self) -> Tensor:
        """-eps / sigma = (alpha x0 - x_t) / sigma^2, the estimate of grad log p_t(x_t)."""
        return self.raw if self.kind == "score" else -self.eps / self._sigma

    @property
    def F(self) -> Tensor:
        """TrigFlow's network output, (dx/dt) / sigma_data = cos(t) eps - sin(t) x0 / sigma_data; needs a
        TrigFlow schedule.
        """
        if self.kind == "F":
            return self.raw
        return self._alpha * self.eps - self._sigma * self.x0 / _sigma_data(self.schedule) ** 2

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt of the probability-flow ODE: alpha'(t) x0 + sigma'(t) eps."""
        d_alpha = expand(self.schedule.d_alpha(self.t), self.x_t)
        d_sigma = expand(self.schedule.d_sigma(self.t), self.x_t)
        return d_alpha * self.x0 + d_sigma * self.eps

    def at(self, t: Tensor) -> Tensor:
        """Where this prediction's straight line stands at time `t`: alpha(t) x0 + sigma(t) eps (DDIM's move)."""
        return self.schedule.add_noise(self.x0, self.eps, t)


def _sigma_data(schedule: Schedule) -> float:
    if not schedule.angular:
        raise ValueError(
            f"F is defined under the TrigFlow schedule only, not under {type(schedule).__name__}"
        )
    return schedule.sigma_data
