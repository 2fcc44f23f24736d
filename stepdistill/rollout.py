"""The student rolled out by its own sampling, to train it on the states it will meet."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepdistill.methods.base import Batch, Networks
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like

Simulated = Literal["states", "counts", "passes", "longest"]


def simulate(
    sampling: Sampling,
    nets: Networks,
    batch: Batch,
    late: float = 0.0,
    by: Simulated = "states",
    first: int = 0,
    **inputs: Tensor,
) -> tuple[Tensor, Tensor, float]:
    """Backward simulation (DMD2, arXiv 2405.14867, Sec. 4.5): the state the student meets at one of its own
    sampling steps.

    Draws a step count of `sampling.steps` and a position K in its grid, one for the whole global batch, and
    rolls the student out to there without gradient, by the very rule that samples it later. K = 0 is the
    student's first state, pure noise.

    by: "states" meets every (count, K) alike, so that the last ones of a long grid hold; "counts" every count,
    which favours pure noise; "passes" a count the rarer the longer it is (probability over 1 / count), which
    spends as much on one step as on many; "longest" the states of the longest count alike and no others.
    late: positions before that fraction of the grid are left out. first: so many first positions are, too.

    Returns:
        x_t (B, ...), t (B,) and t as a number.
    """
    schedule = nets.schedule
    states = [
        (count, place) for count in sampling.steps for place in range(max(first, int(late * count)), count)
    ]
    if by != "states":
        counts = list(sampling.steps)
        if by == "longest":
            counts = [max(counts)]
        elif by == "passes":
            counts = [count for count in counts for _ in range(math.lcm(*counts) // count)]
        only = counts[batch.generator.shared_randint(0, len(counts))]
        states = [(count, place) for count, place in states if count == only]
    count, place = states[batch.generator.shared_randint(0, len(states))]
    grid = sampling.grid(schedule, count)[: place + 1]
    with torch.no_grad():
        x = sampling.first_input(schedule, batch.randn(), grid[0])
        x_t = sampling.walk(nets.student, x, grid, lambda _: batch.randn(), batch.cond, **inputs)
    return x_t, times_like(grid[-1], x_t), grid[-1]
