"""PPCL: contiguous layer distillation, which makes a network shallower (arXiv 2511.16156).

Each interval u..v of blocks becomes one block S, which begins as a copy of block u. It is given what the *teacher's* block
u is given, and learns what the teacher's block v gives, for each stream of tokens (text, image), token by token:

    L = |n(S(h)) - n(T_v)|^2 + w (log |S(h)| - log |T_v|)^2,   n(y) = y / |y|,   so the first term is 2 (1 - cos)   (Eq. 7)

Nothing of one interval reaches another, so each may be plugged in or left out afterwards (`stepdistill.load(...,
intervals=...)`). The paper's loss is its first term, which leaves the length free; the second (ours) holds it.

The intervals are found by `python -m training.prune RECIPE`, see `stepdistill/redundancy.py`, or given. What comes out is a
many-step teacher with fewer blocks: heal it by `output_kd`, distil it by any method.

Normal ranges: the loss begins at the harm of leaving the blocks out and falls by half in a few hundred iterations;
cosine ends above 0.95.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill import timesteps
from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.errors import UserError
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.pruning import Interval, Pruned, recording

# Below the length of any token that says something.
LEAST = 1e-6


class PPCL(Method):
    needs_images = True
    many_steps = True
    leaves_teacher = True
    rules = ("ode",)

    @dataclass
    class Config:
        # "LIST.FIRST-LAST", blocks that become one; () = to be found.
        intervals: tuple[str, ...] = ()
        # Blocks that go where the intervals are found; 0 = a third of those that can.
        remove: int = 0
        # Samples by which they are found.
        calibration: int = 512
        # Of the length's term; 0 = the paper's loss.
        length_weight: float = 0.1
        # Share of samples without their condition.
        cond_dropout: float = 0.1
        time_density: timesteps.Density = "uniform"
        time_mean: float = timesteps.EDM_MEAN
        time_std: float = 1.2
        # Used by previews and written on the card; training does not see it.
        guidance_scale: float = 2.0

        def __post_init__(self) -> None:
            if self.remove < 0:
                raise ValueError(f"remove must be 0 (a third) or more, got {self.remove}.")
            if self.calibration < 8:
                raise ValueError(f"calibration must be at least 8 samples, got {self.calibration}.")

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode", "guidance": "cfg", "scale": config.guidance_scale}

    def student_over(self, base: Denoiser) -> Denoiser:
        if not self.config.intervals:
            raise UserError("method.intervals is empty; `python -m training.prune RECIPE` finds them.")
        return Pruned(base, [Interval.parse(each) for each in self.config.intervals])

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def noised(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """x_t, t and condition of what the teacher is looked at with."""
        config, noise = self.config, batch.generator
        # The blocks are found before there is a student.
        unit = unwrap(nets.teacher).sigma_data
        shape = {"mean": config.time_mean, "std": config.time_std, "unit": unit}
        t = timesteps.draw(config.time_density, nets.schedule, noise, **shape)
        x_t = nets.schedule.add_noise(batch.x0, batch.randn(), t)
        return x_t, t, batch.dropped_cond(config.cond_dropout)

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        intervals = [Interval.parse(each) for each in self.config.intervals]
        with torch.no_grad(), recording(nets.teacher, intervals) as told:
            nets.teacher(*self.noised(nets, batch))
        made = nets.student(told=told)
        parts = [matched(made[each], told[each].target) for each in intervals]
        cosine, length = (torch.stack(each).mean(0) for each in zip(*parts, strict=True))
        total = 2 * (1 - cosine) + self.config.length_weight * length
        return {"total": total, "cosine": cosine.detach(), "length": length.detach()}


def matched(made: Sequence[Tensor], target: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(cosine, squared log-ratio of lengths) of tokens (B, N, C) or maps, mean over tokens and streams: (B,) each.

    Streams that the target has none of (None) and tokens that are zero in it are left out.
    """
    cosines, lengths = [], []
    for ours, theirs in zip(made, target, strict=True):
        if theirs is None:
            continue
        ours, theirs = ours.float(), theirs.float()
        a, b = ours.norm(dim=-1), theirs.norm(dim=-1)
        told = b > LEAST
        share = told.flatten(1).float()
        share = share / share.sum(1, keepdim=True).clamp(min=1)
        cosine = (ours * theirs).sum(-1) / (a * b).clamp(min=LEAST**2)
        ratio = (a.clamp(min=LEAST) / b.clamp(min=LEAST)).log().square()
        cosines.append((cosine.flatten(1) * share).sum(1))
        lengths.append((ratio.flatten(1) * share).sum(1))
    return torch.stack(cosines).mean(0), torch.stack(lengths).mean(0)
