"""A teacher judged without images: under each reading of its output it draws samples, and denoises those."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, map_cond
from stepdistill.families.base import Family
from stepdistill.noise import SampleNoise
from stepdistill.sampling import MANY_STEPS
from training.denoising import (
    LEVELS,
    REVERSED,
    VERIFIED,
    Errors,
    chunk_of,
    errors_of,
    picked,
    readings,
    told_of,
)
from training.teacher import Examples, Verdict

STEPS, COUNT = 16, 16
# Of pictures, about: x0 of latents are scaled to 1, pixels are in [-1, 1].
SPREAD = 0.7
# Beyond this standard deviation a sample is no picture.
MOST_SPREAD = 1e3
WHERE = "samples of its own"


@torch.no_grad()
def judge_by_itself(family: Family, prompts: Sequence, device: Any, batch: int) -> Verdict:
    """Each reading by its error on the samples drawn under it.

    The right one gives pictures that the network knows. Wrong ones give noise or nothing, which it does not denoise; one
    that it does, but better by another reading, is out as well. All are drawn under one condition, and measured by how
    they differ: a network that hears its condition alone draws one picture, and would denoise it perfectly.
    """
    teacher = family.teacher
    found: dict[str, tuple[float, ...]] = {}
    spread = (0.0, 0.0)
    for kind in readings(teacher.native, teacher.kind):
        examples = own_samples(family, kind, prompts, device, batch)
        x0 = examples.x0
        found[kind] = (math.inf,) * len(LEVELS)
        if x0.isfinite().all() and 0 < float(x0.std()) < MOST_SPREAD:
            # Levels of pictures: at those of samples that are all but one colour every reading is right.
            chunk = chunk_of(family.shape, batch)
            errors = errors_of(
                teacher, x0, examples.cond, chunk=chunk, spread=max(float(x0.std()), SPREAD), by_place=True
            )
            if errors.mean(kind) >= VERIFIED or not errors.clearly_better(kind):
                found[kind] = errors.levels[kind]
        if kind == teacher.kind:
            spread = float(x0.std()), float(x0.mean())
    return Verdict(teacher.kind, Errors(found), WHERE, *spread)


def own_samples(family: Family, kind: str, prompts: Sequence, device: Any, batch: int) -> Examples:
    """As many as prompts, of a teacher whose output is read as `kind`: unguided and without a condition, where that can be
    said, or all under the first.
    """
    teacher, schedule, count = family.teacher, family.teacher.native, len(prompts)
    told = family.uncond(count) if family.guidable else family.encode([prompts[0]] * count)
    cond = map_cond(lambda c: c.to(device), told)
    network = _Reversed(teacher.network) if kind == REVERSED else teacher.network
    read = Denoiser(network, "flow" if kind == REVERSED else kind, schedule)
    noise = SampleNoise(range(count), phase="check_teacher", device=device).randn(*family.shape)
    times, parts = MANY_STEPS.grid(schedule, STEPS), []
    for rows in torch.arange(count).split(chunk_of(family.shape, batch)):
        x_t = MANY_STEPS.first_input(schedule, noise[rows.to(noise.device)], times[0])
        told = told_of(teacher, x_t)
        # This rule draws no noise on the way.
        parts.append(MANY_STEPS.sample(read, x_t, times, lambda _, x_t=x_t: x_t, picked(cond, rows), **told))
    return Examples(torch.cat(parts), cond, WHERE)


class _Reversed(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *given: Any, **told: Any) -> Tensor:
        return -self.network(*given, **told)
