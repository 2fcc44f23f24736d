"""Several seeds of a few prompts, drawn while a run goes on: saturation and collapse, which no loss shows.

A student that draws one picture of a prompt, or pictures of too much contrast, has the losses of a good one, and a Fréchet
distance tells late. So beside the teacher's own samples of the same prompts and seeds stand two ratios:

    samples/std_ratio      the standard deviation of the student's x0 over that of the teacher's
    samples/seed_spread    the mean distance of two seeds' x0 of one prompt over the teacher's
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.drawing import Sampler
from stepdistill.families.base import Family
from training.data import Source
from training.preview import preview_prompts, teacher_sampler, teacher_steps

PROMPTS, SEEDS, TEACHER_STEPS = 4, 8, 25


class Seeds:
    """Of one stage: the first prompts of its data, each with the seeds 0, 1, 2, ..."""

    def __init__(self, family: Family, source: Source, guidance: float) -> None:
        self.family, self.guidance = family, guidance
        prompts = preview_prompts(family, source, PROMPTS)
        self.prompts = [prompt for prompt in prompts for _ in range(SEEDS)]
        self.seeds = list(range(len(prompts) * SEEDS))
        # Drawn once per stage.
        self._teachers: tuple[float, float] | None = None

    def ratios(self, sampler: Sampler) -> dict[str, float]:
        """By the names above, of the student in its fewest steps; nothing where there is no teacher."""
        if self.family.teacher is None:
            return {}
        if self._teachers is None:
            teacher = teacher_sampler(self.family, self.guidance, sampler.device)
            self._teachers = self._measured(teacher, teacher_steps(self.family, TEACHER_STEPS))
        std, spread = self._measured(sampler, min(sampler.steps or (TEACHER_STEPS,)))
        return {
            "samples/std_ratio": std / max(self._teachers[0], 1e-12),
            "samples/seed_spread": spread / max(self._teachers[1], 1e-12),
        }

    def _measured(self, sampler: Sampler, steps: int) -> tuple[float, float]:
        x0 = sampler.at(steps, chunk=SEEDS).x0(self.prompts, self.seeds).float()
        return float(x0.std()), seed_spread(x0.reshape(-1, SEEDS, x0[0].numel()))


def seed_spread(x0: Tensor) -> float:
    """Mean distance of two different seeds, of x0 (prompts, seeds, elements)."""
    count = x0.shape[1]
    return float((torch.cdist(x0, x0).sum((1, 2)) / (count * (count - 1))).mean())
