"""Noise processes: x_t = alpha(t) x0 + sigma(t) eps, eps ~ N(0, I), for every schedule and always by these
names.

The only physical coordinate is the noise-to-signal ratio rho = sigma / alpha. Two schedules at equal rho show
a network the same picture up to a scale, which is what lets a method run under one schedule with a teacher
trained under another (`denoiser.py`). Times and coefficients are float64; `expand` shapes them for
broadcasting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RHO_LIMIT = 1e4  # keeps zero-terminal-SNR schedules finite: alpha is never below 1e-4


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Shape a per-sample coefficient (B,) to broadcast over `like` (B, ...), on its device.

    Half-precision images get float32 coefficients, so that alpha and sigma are never rounded to 8 or 11 bits.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return coefficient.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


class Schedule:
    """alpha(t), sigma(t) and their derivatives on [t_min, t_max]; t grows with the noise.

    All functions map float64 (B,) -> float64 (B,).
    """

    t_min: float
    t_max: float

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
        """Noise-to-signal ratio sigma / alpha."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps. x0, eps: (B, ...), t: (B,)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps


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


class Flow(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t; flow time 0 is data, 1 is noise."""

    t_min, t_max = 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - _time(t)).clamp(min=1 / _RHO_LIMIT)

    def sigma(self, t: Tensor) -> Tensor:
        return _time(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(_time(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_time(t))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        rho = _time(rho)
        return (rho / (1 + rho)).clamp(self.t_min, self.t_max)


class TrigFlow(Schedule):
    """alpha = cos(t), sigma = sigma_data sin(t) on [0, pi/2] (Lu & Song 2024, arXiv 2410.11081).

    The paper's z has standard deviation sigma_data; eps here always has unit variance, hence the factor in
    sigma.
    """

    t_min, t_max = 0.0, math.pi / 2

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(_time(t)).clamp(min=1 / _RHO_LIMIT)

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


def as_edm(schedule: Schedule, least: float = 0.002, most: float = 80.0) -> EDM:
    """The variance-exploding schedule over the noise levels `schedule` has, within EDM's range: where methods
    written in EDM's terms run, whatever their networks were trained in.
    """
    low, high = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return EDM(max(low, least), min(high, most))


def _time(t: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)
