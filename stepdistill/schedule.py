"""Noise processes: x_t = alpha(t) x0 + sigma(t) eps, eps ~ N(0, I), for every schedule and always by
these names.

The only physical coordinate is the noise-to-signal ratio rho = sigma / alpha. Two schedules at equal rho
show a network the same picture up to a scale, which is what lets a method run under one schedule with a
teacher trained under another (`denoiser.py`). Times and coefficients are float64; `expand` shapes them
for broadcasting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.shift import shifted, stretched

# Keeps zero-terminal-SNR schedules finite: alpha is never below 1e-4.
_RHO_LIMIT = 1e4


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

    def t_of_rho(self, rho: Tensor) -> Tensor:
        """The time at which sigma / alpha equals `rho`; outside the schedule's range, the nearer end."""
        raise NotImplementedError

    def rho(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha; finite where no signal is left, though alpha is exact there."""
        return self.sigma(t) / self.alpha(t).clamp(min=1 / _RHO_LIMIT)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps. x0, eps: (B, ...), t: (B,)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def first_state(self, z: Tensor, t: float) -> Tensor:
        """What a sampler starts from at time t, from unit noise z (B, ...): sigma_t z, unless pipelines of this
        kind start from z itself.
        """
        return self.pure_noise(z, t)

    def pure_noise(self, z: Tensor, t: float) -> Tensor:
        """sigma_t z: a state at time t without signal, z (B, ...)."""
        return z * expand(self.sigma(times_like(t, z)), z)

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """The times a student of `steps` steps is called at, falling from t_max: even in t.

        Args:
            finest: points of the grid all step counts are taken from, every (finest / steps)-th; 0 = steps.
            first_rho: the noise-to-signal ratio where the schedule counts as ending; 0 = at its end.

        Raises:
            ValueError: steps is not at least 1 or exceeds `finest`.
            UserError: the schedule has fewer times than that (VP).
        """
        finest = _at_least(steps, finest)
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


class EDM(Schedule):
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022)."""

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0):
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _time(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return _time(rho).clamp(self.t_min, self.t_max)

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """Of the 40 Karras times `CMStochasticIterativeScheduler` has, which strides by floor(40 / steps)."""
        points = max(40, _at_least(steps, finest))
        cut = EDM(self.t_min, min(first_rho or self.t_max, self.t_max))
        times = cut.ode_grid(points - 1, "karras").tolist()
        return tuple(times[i * (points // steps)] for i in range(steps))

    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        """Even in rho^(1/7) (Karras et al. 2022, Eq. 5)."""
        return tuple(self.ode_grid(steps, "karras")[:-1].tolist())


class Flow(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t; flow time 0 is data, 1 is noise.

    Of the samplers' grids alone:
        shift: see `shift.shifted`; above 1 they stay longer where noise is high. A function gives that of each
            number of steps (FLUX.2).
        last: a many-step model's last time before the shift; 0 = 1 / steps.
        terminal: what its last time is stretched to after the shift; 0 = off (Qwen-Image).
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, shift: float | Callable[[int], float] = 1.0, last: float = 0.0, terminal: float = 0.0):
        self.shift, self.last, self.terminal = shift, last, terminal

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - _time(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _time(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        rho = _time(rho)
        return (rho / (1 + rho)).clamp(self.t_min, self.t_max)

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """Even in the time before the shift, which is a factor of rho = t / (1 - t)."""
        shift = self.shift_at(_at_least(steps, finest))
        grid = super().few_step_grid(steps, finest, first_rho / shift)
        return tuple(shifted(t, shift) for t in grid)

    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        """Even in the time before the shift, as `FlowMatchEulerDiscreteScheduler` has it."""
        grid = super().teacher_grid(steps)
        if self.last:
            grid = torch.linspace(1, self.last, steps, dtype=torch.float64).tolist()
        shift = self.shift_at(steps)
        return stretched([shifted(t, shift) for t in grid], self.terminal)

    def few_step_ode_grid(self, steps: int, finest: int) -> tuple[float, ...]:
        """Even before the shift of `finest` steps, of which a stock scheduler holds one. A many-step model's own last
        time is left out: it would stretch two steps to (1, `terminal`), and one step to nothing.
        """
        shift = self.shift_at(_at_least(finest, finest))
        return tuple(shifted(t, shift) for t in super().few_step_grid(steps))

    def shift_at(self, steps: int) -> float:
        """Of a grid of so many steps."""
        return self.shift(steps) if callable(self.shift) else self.shift


class TrigFlow(Schedule):
    """alpha = cos(t), sigma = sigma_data sin(t) on [0, pi/2] (Lu & Song 2024, arXiv 2410.11081).

    The paper's z has standard deviation sigma_data; eps here always has unit variance, hence the factor
    in sigma.
    """

    t_min, t_max = 0.0, math.pi / 2
    angular = True

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(_time(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.sin(_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.cos(_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return torch.atan(_time(rho) / self.sigma_data).clamp(self.t_min, self.t_max)


class VP(Schedule):
    """Variance preserving from a table of cumulative products (DDPM, Stable Diffusion); t in [0, T - 1].

    At whole t alpha = sqrt(alphas_cumprod[t]) and sigma = sqrt(1 - alphas_cumprod[t]) exactly; between, log
    rho is interpolated linearly, which gives every formula of this package a continuous, monotone time.
    """

    discrete = True

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]):
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten().cpu()
        if (
            table.numel() < 2
            or not bool((table[1:] < table[:-1]).all())
            or float(table[0]) > 1
            or float(table[-1]) < 0
        ):
            raise ValueError("alphas_cumprod must fall strictly from at most 1 to at least 0")
        self.t_min, self.t_max = 0.0, float(table.numel() - 1)
        self.log_rho = (0.5 * ((1 - table) / table).log()).clamp(max=math.log(_RHO_LIMIT))

    @classmethod
    def from_betas(
        cls, kind: str = "scaled_linear", start: float = 0.00085, end: float = 0.012, steps: int = 1000
    ) -> VP:
        """Stable Diffusion's defaults; `kind` is "linear" (in beta) or "scaled_linear" (in sqrt(beta))."""
        if kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        else:
            raise ValueError(f"beta kind must be 'linear' or 'scaled_linear', got {kind!r}")
        return cls(torch.cumprod(1 - betas, 0))

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log rho(t) and its derivative, both float64 on t's device."""
        t = _time(t).clamp(self.t_min, self.t_max)
        table = self.log_rho.to(t.device)
        below = t.floor().long().clamp(max=table.numel() - 2)
        slope = table[below + 1] - table[below]
        return torch.lerp(table[below], table[below + 1], t - below), slope

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._interpolate(t)[0]).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._interpolate(t)[0]).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        # alpha = sigmoid(-2 l)^(1/2) with l = log rho, hence d alpha / dl = -alpha sigma^2.
        return -self.alpha(t) * self.sigma(t) ** 2 * self._interpolate(t)[1]

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.alpha(t) ** 2 * self._interpolate(t)[1]

    def rho(self, t: Tensor) -> Tensor:
        return self._interpolate(t)[0].exp()

    def t_of_rho(self, rho: Tensor) -> Tensor:
        log_rho = _time(rho).clamp(min=1e-12).log()
        table = self.log_rho.to(log_rho.device)
        log_rho = log_rho.clamp(float(table[0]), float(table[-1]))
        above = torch.searchsorted(table, log_rho.contiguous()).clamp(1, table.numel() - 1)
        low, high = table[above - 1], table[above]
        return (above - 1).double() + (log_rho - low) / (high - low)

    def first_state(self, z: Tensor, t: float) -> Tensor:
        """z itself, as if t were pure noise, which a table's last entry is not quite (DMD2, LCM)."""
        return z

    def entries(self, first_rho: float = 0.0) -> int:
        """Of the table up to the whole time whose rho is nearest `first_rho` (in log rho); 0 = all."""
        last = round(float(self.t_of_rho(torch.tensor(first_rho)))) if first_rho else self.t_max
        return int(last) + 1

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """i T / steps - 1 for i = steps .. 1, which is 999, 749, 499, 249 at 4 and is what `LCMScheduler` lists,
        so that the student leaves with a stock scheduler. `finest` is its `original_inference_steps`. With
        `first_rho` the table is cut short: one step of Stable Diffusion from rho = 2.5 is called at 625.
        """
        finest, entries = _at_least(steps, finest), self.entries(first_rho)
        if finest > entries:
            raise UserError(
                f"{finest} steps are more than the {entries} timesteps of the schedule; ask for fewer."
            )
        stride = entries // finest
        grid = [i * stride - 1 for i in range(finest, 0, -1)]
        # LCMScheduler picks floor(i * finest / steps), i = 0 .. steps - 1.
        return tuple(float(grid[i * finest // steps]) for i in range(steps))

    def teacher_grid(self, steps: int) -> tuple[float, ...]:
        """`DDIMScheduler`'s "trailing" spacing, round(i T / steps) - 1."""
        count = int(self.t_max) + 1
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be between 1 and {count}, got {steps}")
        return tuple(float(round(count - i * count / steps) - 1) for i in range(steps))


def times_like(values: Sequence[float] | float, x: Tensor) -> Tensor:
    """(B,) float64 on x's device, for one number or one per sample."""
    t = torch.as_tensor(values, dtype=torch.float64, device=x.device)
    return t.expand(x.shape[0]) if t.ndim == 0 else t


def _at_least(steps: int, finest: int) -> int:
    """Points of the grid `steps` are taken from. Raises ValueError where they are too many or none."""
    finest = finest or steps
    if not 1 <= steps <= finest:
        raise ValueError(f"steps must be between 1 and {finest}, got {steps}")
    return finest


def _time(t: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)
