"""The noise processes models are trained under: EDM, flow matching, TrigFlow and tables of DDPM's kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.process import RHO_LIMIT, Schedule, as_time, at_least, expand, times_like
from stepdistill.shift import shifted, stretched

__all__ = ["EDM", "VP", "Flow", "Prefix", "Schedule", "TrigFlow", "expand", "times_like"]


class EDM(Schedule):
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022)."""

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0):
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return as_time(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(as_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return as_time(rho).clamp(self.t_min, self.t_max)

    def time_unit(self, t: Tensor) -> Tensor:
        """Networks of this kind are told 250 log sigma."""
        return as_time(t) / 250

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """Of the 40 Karras times `CMStochasticIterativeScheduler` has, which strides by floor(40 / steps)."""
        points = max(40, at_least(steps, finest))
        cut = EDM(self.t_min, min(first_rho or self.t_max, self.t_max))
        times = cut.ode_grid(points - 1, "karras").tolist()
        return tuple(times[i * (points // steps)] for i in range(steps))

    def at_angle(self, angle: float) -> None:
        return None

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
        return 1 - as_time(t)

    def sigma(self, t: Tensor) -> Tensor:
        return as_time(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(as_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        rho = as_time(rho)
        return (rho / (1 + rho)).clamp(self.t_min, self.t_max)

    def time_of(self, other: Schedule, t: Tensor) -> Tensor:
        alpha, sigma = other.alpha(t), other.sigma(t)
        return (sigma / (alpha + sigma)).clamp(self.t_min, self.t_max)

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        """Even in the time before the shift, which is a factor of rho = t / (1 - t)."""
        shift = self.shift_at(at_least(steps, finest))
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
        shift = self.shift_at(at_least(finest, finest))
        return tuple(shifted(t, shift) for t in super().few_step_grid(steps))

    def bent(self, t: Tensor) -> Tensor:
        """By the shift of a grid of fifty steps, where it depends on that."""
        return shifted(t, self.shift_at(50))

    def shift_at(self, steps: int) -> float:
        """Of a grid of so many steps."""
        return self.shift(steps) if callable(self.shift) else self.shift


class Prefix(Flow):
    """States of a sequence that are data in their first places and noise in the rest; t is the share that is noise.

    length: places, the first axis of a sample. alpha and sigma are those shares. Samplers keep the noise of the places
    that are left, or may draw it anew: it is independent of what is known.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def agrees(self, other: Schedule) -> bool:
        return isinstance(other, Prefix) and other.length == self.length

    def few_step_grid(self, steps: int, finest: int = 0, first_rho: float = 0.0) -> tuple[float, ...]:
        return super().few_step_grid(self._within(steps), finest, first_rho)

    def few_step_ode_grid(self, steps: int, finest: int) -> tuple[float, ...]:
        return super().few_step_ode_grid(self._within(steps), finest)

    def _within(self, steps: int) -> int:
        """Every step says one place at least. Raises UserError for more steps than there are places."""
        if steps > self.length:
            raise UserError(
                f"{steps} steps are more than the {self.length} places of an image; ask for fewer."
            )
        return steps

    def kept(self, t: Tensor) -> Tensor:
        """How many places hold data at t (B,), int64."""
        return ((1 - as_time(t)) * self.length).round().long()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0 in the first places, eps behind. x0, eps: (B, length, ...)."""
        places = torch.arange(self.length, device=x0.device)
        data = places < self.kept(t).to(x0.device)[:, None]
        return torch.where(data.reshape(*data.shape, *[1] * (x0.ndim - 2)), x0, eps)


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
        return torch.cos(as_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(as_time(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.sin(as_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.cos(as_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return torch.atan(as_time(rho) / self.sigma_data).clamp(self.t_min, self.t_max)

    def at_angle(self, angle: float) -> float:
        return angle

    def time_of(self, other: Schedule, t: Tensor) -> Tensor:
        return torch.atan2(other.sigma(t) / self.sigma_data, other.alpha(t)).clamp(self.t_min, self.t_max)


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
        self.log_rho = (0.5 * ((1 - table) / table).log()).clamp(max=math.log(RHO_LIMIT))

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

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at every whole time, float64; 0 where no signal is left."""
        return torch.sigmoid(-2 * self.log_rho).masked_fill(self.log_rho >= math.log(RHO_LIMIT), 0)

    @property
    def ends_without_signal(self) -> bool:
        # Some schedulers keep 2^-24 of a zero terminal signal, which is a rho of 4096.
        return float(self.log_rho[-1]) > math.log(1e3)

    def agrees(self, other: Schedule) -> bool:
        """As far as both tables go."""
        if not isinstance(other, VP):
            return False
        shared = min(len(self.log_rho), len(other.log_rho))
        return torch.allclose(self.alphas_cumprod[:shared], other.alphas_cumprod[:shared], 0, 1e-3)

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log rho(t) and its derivative, both float64 on t's device."""
        t = as_time(t).clamp(self.t_min, self.t_max)
        table = self.log_rho.to(t.device)
        below = t.floor().long().clamp(max=table.numel() - 2)
        slope = table[below + 1] - table[below]
        return torch.lerp(table[below], table[below + 1], t - below), slope

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._interpolate(t)[0]).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._interpolate(t)[0]).sqrt()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_rho = self._interpolate(t)[0]
        return torch.sigmoid(-2 * log_rho).sqrt(), torch.sigmoid(2 * log_rho).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        # alpha = sigmoid(-2 l)^(1/2) with l = log rho, hence d alpha / dl = -alpha sigma^2.
        return -self.alpha(t) * self.sigma(t) ** 2 * self._interpolate(t)[1]

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.alpha(t) ** 2 * self._interpolate(t)[1]

    def rho(self, t: Tensor) -> Tensor:
        return self._interpolate(t)[0].exp()

    def t_of_rho(self, rho: Tensor) -> Tensor:
        log_rho = as_time(rho).clamp(min=1e-12).log()
        table = self.log_rho.to(log_rho.device)
        log_rho = log_rho.clamp(float(table[0]), float(table[-1]))
        above = torch.searchsorted(table, log_rho.contiguous()).clamp(1, table.numel() - 1)
        low, high = table[above - 1], table[above]
        return (above - 1).double() + (log_rho - low) / (high - low)

    def at_angle(self, angle: float) -> float:
        return float(round(super().at_angle(angle)))

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
        finest, entries = at_least(steps, finest), self.entries(first_rho)
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
