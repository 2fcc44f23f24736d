"""What a network predicts, by how well it denoises: the error of x0 for each way of reading its output.

At five noise levels rho, noised data are given to the network, and its output is read as each quantity it might stand
for. The mean square error of the x0 that follows is divided by that of the best linear denoiser of each channel,
rho^2 v / (v + rho^2) for data of variance v. A trained network read as it was trained is far below 1, as it knows more
of images than their variance. A network that says nothing is a linear denoiser by any reading, so it is at 1 at best:
random weights verify nothing. Read wrongly, a trained network is above 1 at high noise, or far above its right reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, Denoiser, map_cond
from stepdistill.prediction import Prediction
from stepdistill.schedule import Flow, Schedule

# Noise-to-signal ratios in units of the data's standard deviation. Below them all readings give x0 from x_t itself.
LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Of the best linear denoiser's error.
VERIFIED = 0.9
# A reading is wrong where its error is so many times that of another, which is verified. Twice or more was seen.
CLEARLY = 1.5
# Of x0, in one test: enough for an error to within some percent, and what is worth its time.
VALUES, WORTH = 2**13, 2**20
MOST = 512
# Velocities that point the other way, x0 - eps.
REVERSED = "reversed flow"
# What diffusers' schedulers call what a network predicts.
SETTINGS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclass(frozen=True)
class Errors:
    """Of one network on one set of data.

    Attributes:
        levels: reading -> mean square error of x0 over that of the best linear denoiser, one per entry of `LEVELS`.
    """

    levels: Mapping[str, tuple[float, ...]]

    def mean(self, reading: str) -> float:
        """Geometric, over the noise levels; infinite where the network's output is not finite."""
        values = self.levels[reading]
        if not all(map(math.isfinite, values)):
            return math.inf
        return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))

    @property
    def best(self) -> str:
        return min(self.levels, key=self.mean)

    def verified(self, reading: str) -> bool:
        """It denoises, and no other reading does so better."""
        return self.mean(reading) < VERIFIED and not self.clearly_better(reading)

    def clearly_better(self, reading: str) -> str:
        """The reading that fits, and clearly better than `reading` does; "" where none is clearly right."""
        best = self.mean(self.best)
        wrong = best < VERIFIED and self.mean(reading) > CLEARLY * best
        return self.best if wrong else ""

    def __str__(self) -> str:
        return ", ".join(f"{reading} {self.mean(reading):.2f}" for reading in self.levels)


def readings(schedule: Schedule, declared: str) -> tuple[str, ...]:
    """How an output might be read: along a table what its scheduler can say, along a flow the velocity, its reverse and
    those, and else as it is declared.
    """
    if schedule.discrete:
        return tuple(SETTINGS)
    return ("flow", REVERSED, *SETTINGS) if isinstance(schedule, Flow) else (declared,)


def count_of(shape: Iterable[int], available: int) -> int:
    """Examples of one test: eight, fewer of large ones, more of small ones."""
    size = math.prod(shape)
    few = min(8, max(2, WORTH // size))
    return min(max(VALUES // size, few), MOST, available)


def chunk_of(shape: Iterable[int], batch: int) -> int:
    """Examples of one pass: as many as a pass of training holds, and more of small ones."""
    return max(batch, VALUES // math.prod(shape))


@torch.no_grad()
def errors_of(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    *,
    kinds: Iterable[str] = (),
    chunk: int = 8,
    spread: float = 0.0,
    by_place: bool = False,
    seed: int = 0,
) -> Errors:
    """The errors of `denoiser` along its own schedule on x0 (N, *shape) under cond, batch first.

    kinds: the readings, all of `readings` when not given. chunk: the batch of one pass. spread: the standard deviation
    that `LEVELS` count in, 0 = that of x0. by_place: the linear denoiser knows the mean of each place, over examples, and
    not of each channel alone, so that one picture again and again has no variance.
    """
    schedule = denoiser.native
    kinds = tuple(kinds) or readings(schedule, denoiser.kind)
    values = x0.double()
    variance = values.var(0) if by_place else values.transpose(0, 1).flatten(1).var(1, unbiased=False)
    spread = spread or float(variance.mean().sqrt())
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for level in LEVELS:
        t = schedule.t_of_rho(torch.full((len(x0),), level * spread, dtype=torch.float64))
        t = t.round() if schedule.discrete else t
        squared = float(schedule.rho(t[:1])) ** 2
        linear = float((variance * squared / (variance + squared)).mean().clamp(min=1e-12))
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        sums = dict.fromkeys(kinds, 0.0)
        for rows in torch.arange(len(x0)).split(chunk):
            told = picked(cond, rows)
            part, times = x0[rows.to(x0.device)], t[rows].to(x0.device)
            x_t = schedule.add_noise(part, eps[rows.to(eps.device)], times)
            raw = denoiser(x_t, times, told, in_schedule=schedule, **told_of(denoiser, x_t)).raw
            for kind in kinds:
                said = read(raw, kind, x_t, times, schedule)
                sums[kind] += float((said - part).double().square().sum())
        for kind in kinds:
            found[kind].append(sums[kind] / x0.numel() / linear)
    return Errors({kind: tuple(values) for kind, values in found.items()})


def read(raw: Tensor, kind: str, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x0 (B, *shape) of a network's output, read as `kind`."""
    if kind == REVERSED:
        raw, kind = -raw, "flow"
    return Prediction(raw, kind, x_t, t, schedule).x0


def told_of(denoiser: Denoiser, x_t: Tensor) -> dict[str, Tensor]:
    """What a network that was trained to be told a guidance scale is told: none."""
    names = getattr(denoiser.network, "told", ())
    return {name: torch.ones(len(x_t), dtype=torch.float64, device=x_t.device) for name in names}


def picked(cond: Cond, rows: Tensor) -> Cond:
    """Some of the conditions."""
    return map_cond(lambda c: c[rows.to(c.device)], cond)
