"""Where on the schedule to look in training: densities p(t). Grids of samplers are the schedules' own.

A density is a function of a batch's `SampleNoise`; every one returns (B,) float64 times of the
given schedule.

Log-normal densities are of rho in units of the data's standard deviation: `mean` is that of log(rho / unit). Where
images differ in scale, so does the noise that hides them; papers whose data have a deviation of 0.5 (EDM, sCM, SiD,
SANA-Sprint) state log rho itself, which is log 2 = 0.693 less than what stands here: EDM's -1.2 is -0.507.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.noise import SampleNoise
from stepdistill.schedule import EDM, Schedule

# Of log(rho / unit): the paper's -1.2 for data of deviation 0.5 (Karras et al. 2022, Table 1).
EDM_MEAN = -0.507


def uniform(schedule: Schedule, noise: SampleNoise, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform over the fraction [low, high] of the schedule's time.

    Under a discrete schedule (VP) times are whole. EDM's time is the noise itself, of which half lies above 40:
    there it is Karras's index that is uniform, as in `karras`.
    """
    if isinstance(schedule, EDM):
        return karras(schedule, noise, low, high)
    span = schedule.t_max - schedule.t_min
    if schedule.discrete:
        first, last = round(low * (span + 1)), min(round(high * (span + 1)), int(span) + 1)
        return noise.randint(first, max(last, first + 1)).double()
    return schedule.t_min + span * (low + (high - low) * noise.rand())


def shifted(schedule: Schedule, noise: SampleNoise, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform, and then bent as the schedule's samplers bend an even grid: more time where noise is high, under flow with
    a shift above 1. Where there is no shift, uniform. Self-Forcing (arXiv 2506.08009) and LightX2V renoise so.
    """
    return schedule.bent(uniform(schedule, noise, low, high))


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


def lognormal(
    schedule: Schedule, noise: SampleNoise, mean: float = EDM_MEAN, std: float = 1.2, unit: float = 1.0
) -> Tensor:
    """log(rho / unit) ~ N(mean, std^2) (Karras et al. 2022, Table 1), unit the data's standard deviation. Under flow
    and unit 1 this is the logit-normal time of Esser et al. 2024.
    """
    return schedule.t_of_rho(unit * (mean + std * noise.randn(dtype=torch.float64)).exp())


Density = Literal["uniform", "shifted", "karras", "lognormal"]


def draw(
    density: str,
    schedule: Schedule,
    noise: SampleNoise,
    low: float = 0.0,
    high: float = 1.0,
    mean: float = EDM_MEAN,
    std: float = 1.2,
    unit: float = 1.0,
) -> Tensor:
    """A `Density` by name; low and high belong to all but the last, mean, std and unit to that."""
    if density == "lognormal":
        return lognormal(schedule, noise, mean, std, unit)
    return {"uniform": uniform, "shifted": shifted, "karras": karras}[density](schedule, noise, low, high)


def as_edm(schedule: Schedule, least: float = 0.002, most: float = 80.0) -> EDM:
    """The variance-exploding schedule over the noise levels `schedule` has, within EDM's range: where methods
    written in EDM's terms run, whatever their networks were trained in.
    """
    low, high = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return EDM(max(low, least), min(high, most))
