"""Noise processes: x_t = alpha(t) x0 + sigma(t) eps, eps ~ N(0, I), for every schedule and always by
these names.

The only physical coordinate is the noise-to-signal ratio rho = sigma / alpha. Two schedules at equal rho
show a network the same picture up to a scale, which is what lets a method run under one schedule with a
teacher trained under another (`denoiser.py`). Times and coefficients are float64; `expand` shapes them
for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

# Keeps zero-terminal-SNR schedules finite: alpha is never below 1e-4.
RHO_LIMIT = 1e4


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Shape a per-sample coefficient (B,) to broadcast over `like` (B, ...), on its device.

    Half-precision images get float32 coefficients, so that alpha and sigma are never rounded to 8 or 11 bits.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return coefficient.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


class Schedule:
    """alpha(t), sigma(t) and their derivatives on [t_min, t_max]; t grows with the noise.

    All functions map float64 (B,) -> float64 (B,). A grid is a falling tuple of times, at which a sampler calls
    its network.

    Attributes:
        discrete: networks of this kind were trained at whole times only.
        angular: t is TrigFlow's angle, in [0, pi / 2].
    """

    t_min: float
    t_max: float
    discrete: ClassVar[bool] = False
    angular: ClassVar[bool] = False

    @property
    def ends_without_signal(self) -> bool:
        """At t_max nothing of x0 is left, though networks of table processes are called there."""
        return False

    def agrees(self, other: Schedule) -> bool:
        """Whether equal times are equal noise levels of both."""
        return type(self) is type(other)

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        raise NotImplementedError

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once, which is less work where they come from one table."""
        return self.alpha(t), self.sigma(t)

    def t_of_rho(self, rho: Tensor) -> Tensor:
        """The time at which sigma / alpha equals `rho`; outside the schedule's range, the nearer end."""
        raise NotImplementedError

    def rho(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha; finite where no signal is left, though alpha is exact there."""
        return self.sigma(t) / self.alpha(t).clamp(min=1 / RHO_LIMIT)

    def time_unit(self, t: Tensor) -> Tensor:
        """The change of t (B,) that networks of this kind read as one: the fastest wave of their time embedding turns by
        a radian. A thousandth of the range, as flow times are multiplied by 1000 and tables have 1000 entries.
        """
        return torch.full_like(as_time(t), (self.t_max - self.t_min) / 1000)

    def at_angle(self, angle: float) -> float | None:
        """The time at which rho is tan(angle), TrigFlow's own time for data of unit deviation; None where no student can
        be called at a time of its own.
        """
        return float(self.t_of_rho(torch.tensor(angle, dtype=torch.float64).tan()))

    def log_rho_rate(self, t: Tensor) -> Tensor:
        """d log rho / dt; finite at the ends."""
        alpha, sigma = self.alpha(t).clamp(min=1 / RHO_LIMIT), self.sigma(t).clamp(min=1 / RHO_LIMIT)
        return self.d_sigma(t) / sigma - self.d_alpha(t) / alpha

    def time_of(self, other: Schedule, t: Tensor) -> Tensor:
        """The time at which sigma / alpha is what `other` has at its time t; noise alone is noise alone, where a process
        has such a time.
        """
        return self.t_of_rho(other.rho(t))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps. x0, eps: (B, ...), t: (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def first_state(self, z: Tensor, t: float) -> Tensor:
        """What a sampler starts from at time t, from unit noise z (B, ...): sigma_t z, unless pipelines of this
        kind start from z itself.
        """
        return self.pure_noise(z, t)

    def pure_noise(self, z: Tensor, t: float) -> Tensor:
        """sigma_t z: a state at time t without signal, z (B, ...)."""
        return z * expand(self.sigma(times_like(t, z)), z)

    def bent(self, t: Tensor) -> Tensor:
        """Where a sampler's even grid has t (B,) before it is bent: a shift is all that bends one."""
        return t

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """The times a student of `steps` steps is called at, falling from t_max: even in t.

        Args:
            finest: points of the grid all step counts are taken from, every (finest / steps)-th; 0 = steps.
            first_rho: the noise-to-signal ratio where the schedule counts as ending; 0 = at its end.

        Raises:
            ValueError: steps is not at least 1 or exceeds `finest`.
            UserError: the schedule has fewer times than that (VP).
        """
        finest = at_least(steps, finest)
        first = float(self.t_of_rho(torch.tensor(first_rho))) if first_rho else self.t_max
        span = first - self.t_min
        return tuple(first - span * (i * finest // steps) / finest for i in range(steps))

    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        """The times a many-step model is called at in `steps` steps of DDIM, falling from t_max: even in t."""
        return tuple(self.ode_grid(steps)[:-1].tolist())

    def few_step_ode_grid(self, steps: int, finest: int) -> tuple[float, ...]:
        """The times a student of `steps` steps of DDIM is called at, falling from t_max; finest: as `few_step_grid`."""
        return self.teacher_grid(steps)

    def ode_grid(
        self, steps: int, spacing: Literal["trailing", "karras"] = "trailing", power: float = 7.0
    ) -> Tensor:
        """`steps` + 1 falling times for an ODE solver, from t_max to t_min, float64.

        spacing: "trailing" (even in t, starting at t_max) or "karras" (even in rho^(1/power)).
        """
        if spacing == "trailing":
            return torch.linspace(self.t_max, self.t_min, steps + 1, dtype=torch.float64)
        ends = self.rho(torch.tensor([self.t_max, self.t_min], dtype=torch.float64)).clamp(1e-3, 1e3)
        ends = ends ** (1 / power)
        ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        grid = self.t_of_rho((ends[0] + ramp * (ends[1] - ends[0])) ** power)
        # To the last bit: a boundary condition asks for it.
        grid[0], grid[-1] = self.t_max, self.t_min
        return grid


def times_like(values: Sequence[float] | float, x: Tensor) -> Tensor:
    """(B,) float64 on x's device, for one number or one per sample."""
    t = torch.as_tensor(values, dtype=torch.float64, device=x.device)
    return t.expand(x.shape[0]) if t.ndim == 0 else t


def at_least(steps: int, finest: int) -> int:
    """Points of the grid `steps` are taken from. Raises ValueError where they are too many or none."""
    finest = finest or steps
    if not 1 <= steps <= finest:
        raise ValueError(f"steps must be between 1 and {finest}, got {steps}")
    return finest


def as_time(t: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)
