"""Where on the schedule to look: densities p(t) for training, grids for few-step sampling.

A density is a function of a batch's `SampleNoise`; every one returns (B,) float64 times of the given
schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.noise import SampleNoise
from stepdistill.schedule import EDM, VP, Schedule, as_edm


def uniform(schedule: Schedule, noise: SampleNoise, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform over the fraction [low, high] of the schedule's time.

    Under a VP table times are whole, as networks of that kind were trained on whole timesteps only.
    """
    span = schedule.t_max - schedule.t_min
    if isinstance(schedule, VP):
        first, last = round(low * (span + 1)), min(round(high * (span + 1)), int(span) + 1)
        return noise.randint(first, max(last, first + 1)).double()
    return schedule.t_min + span * (low + (high - low) * noise.rand())


def karras(
    schedule: Schedule, noise: SampleNoise, low: float = 0.0, high: float = 1.0, power: float = 7.0
) -> Tensor:
    """Uniform over rho^(1/power) (Karras et al. 2022, Eq. 5), 0 = least noise.

    The ends are the schedule's within EDM's 0.002 and 80, so that a fraction of the range is the same noise
    under every schedule that reaches as far.
    """
    frame = as_edm(schedule)
    ends = torch.tensor([frame.t_min, frame.t_max], dtype=torch.float64) ** (1 / power)
    u = low + (high - low) * noise.rand()
    return schedule.t_of_rho((ends[0] + u * (ends[1] - ends[0])) ** power)


def lognormal(schedule: Schedule, noise: SampleNoise, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log rho ~ N(mean, std^2) (Karras et al. 2022, Table 1). Under flow this is the logit-normal time of
    Esser et al. 2024.
    """
    return schedule.t_of_rho((mean + std * noise.randn(dtype=torch.float64)).exp())


DENSITIES = ("uniform", "karras", "lognormal")


def draw(
    density: str,
    schedule: Schedule,
    noise: SampleNoise,
    low: float = 0.0,
    high: float = 1.0,
    mean: float = -1.2,
    std: float = 1.2,
) -> Tensor:
    """One of `DENSITIES` by name; low and high belong to the first two, mean and std to the last."""
    if density == "lognormal":
        return lognormal(schedule, noise, mean, std)
    return {"uniform": uniform, "karras": karras}[density](schedule, noise, low, high)


def few_step_grid(
    schedule: Schedule, steps: int, finest: int | None = None, first_rho: float | None = None
) -> tuple[float, ...]:
    """The times a student of `steps` steps is called at, falling from t_max, or from where rho is `first_rho`.

    Under a VP table of T entries: i T / steps - 1 for i = steps .. 1, which is 999, 749, 499, 249 at 4 and is
    what `LCMScheduler` lists, so the student leaves with a stock scheduler. `finest` (default: `steps`) is
    the scheduler's `original_inference_steps`: with it the grid is every (finest / steps)-th of the finest
    one.
    Under EDM: taken likewise from the 40 Karras times `CMStochasticIterativeScheduler` has. Elsewhere: even
        in t.
    With `first_rho` the schedule counts as ending there: its table is cut short (`cut_table`), so that one
    step of Stable Diffusion from rho = 2.5 is called at 625.

    Raises:
        ValueError: steps is not at least 1 or exceeds `finest`.
        UserError: a VP table has fewer entries than steps.
    """
    finest = finest or steps
    if not 1 <= steps <= finest:
        raise ValueError(f"steps must be between 1 and {finest}, got {steps}")
    if isinstance(schedule, VP):
        entries = cut_table(schedule, first_rho)
        if finest > entries:
            raise UserError(
                f"{finest} steps are more than the {entries} timesteps of the schedule; ask for fewer."
            )
        stride = entries // finest
        grid = [i * stride - 1 for i in range(finest, 0, -1)]
        # LCMScheduler picks floor(i * finest / steps), i = 0 .. steps - 1.
        return tuple(float(grid[i * finest // steps]) for i in range(steps))
    if isinstance(schedule, EDM):
        points = max(40, finest)
        cut = EDM(schedule.t_min, min(first_rho or schedule.t_max, schedule.t_max))
        karras_times = ode_grid(cut, points - 1, "karras").tolist()
        # CMStochasticIterativeScheduler strides by floor(points / steps).
        return tuple(karras_times[i * (points // steps)] for i in range(steps))
    first = float(schedule.t_of_rho(torch.tensor(first_rho))) if first_rho else schedule.t_max
    span = first - schedule.t_min
    return tuple(first - span * (i * finest // steps) / finest for i in range(steps))


def cut_table(schedule: VP, first_rho: float | None = None) -> int:
    """Entries of a VP table up to the whole time whose rho is nearest `first_rho` (in log rho); None = all."""
    last = schedule.t_max if first_rho is None else round(float(schedule.t_of_rho(torch.tensor(first_rho))))
    return int(last) + 1


def teacher_grid(schedule: Schedule, steps: int) -> tuple[float, ...]:
    """The times a teacher is called at in `steps` steps of DDIM, falling from t_max, whatever `steps` is.

    VP: `DDIMScheduler`'s "trailing" spacing, round(i T / steps) - 1. EDM: even in rho^(1/7). Elsewhere: even
        in t.
    """
    if isinstance(schedule, VP):
        count = int(schedule.t_max) + 1
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be between 1 and {count}, got {steps}")
        return tuple(float(round(count - i * count / steps) - 1) for i in range(steps))
    return tuple(
        ode_grid(schedule, steps, "karras" if isinstance(schedule, EDM) else "trailing")[:-1].tolist()
    )


def ode_grid(schedule: Schedule, steps: int, spacing: str = "trailing", power: float = 7.0) -> Tensor:
    """`steps` + 1 falling times for an ODE solver, from t_max to t_min.

    spacing: "trailing" (even in t, starting at t_max) or "karras" (even in rho^(1/power)).
    """
    if spacing == "trailing":
        return torch.linspace(schedule.t_max, schedule.t_min, steps + 1, dtype=torch.float64)
    ends = schedule.rho(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).clamp(
        1e-3, 1e3
    ) ** (1 / power)
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid = schedule.t_of_rho((ends[0] + ramp * (ends[1] - ends[0])) ** power)
    grid[0], grid[-1] = schedule.t_max, schedule.t_min  # to the last bit: a boundary condition asks for it
    return grid


def times_like(values: Sequence[float] | float, x: Tensor) -> Tensor:
    """(B,) float64 on x's device, for one number or one per sample."""
    t = torch.as_tensor(values, dtype=torch.float64, device=x.device)
    return t.expand(x.shape[0]) if t.ndim == 0 else t
