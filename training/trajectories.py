"""Trajectories of a teacher, computed once: what a student of pairs is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, guided, map_cond
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.base import Pairs, PairSettings
from stepdistill.noise import SampleNoise
from stepdistill.provenance import sha256_of_weights
from stepdistill.schedule import times_like
from training.data import Source
from training.shards import ALONE, Rows, Shards, Share

Device = torch.device | str
# Trajectories per file: what an interruption can cost.
PART = 1024


class Trajectories:
    """The pairs of a run: the guided teacher's DDIM trajectories from unit noise, for the conditions of `source` in turn.

    Number i depends on i, the teacher, `settings` and the source, not on the batch it is computed in (beyond the last
    bits) or on how many there are. Its condition is that of example i modulo the source's size, by the caption
    of the use that this is.
    """

    def __init__(
        self,
        family: Family,
        source: Source,
        settings: PairSettings,
        cache_dir: str | Path,
        device: Device = "cpu",
    ) -> None:
        self.family, self.source, self.settings, self.device = family, source, settings, device
        self.size = settings.count
        facts = {
            "family": f"{family.name} {family.config}",
            "source": source.fingerprint(),
            "settings": [settings.steps, settings.guidance_scale, settings.times],
            "teacher": sha256_of_weights(family.teacher),
        }
        # Whole shards: a run of fewer or more pairs shares them.
        count = -(-settings.count // PART) * PART
        self.shards = Shards(cache_dir, "pairs", facts, count, rows=PART)

    def fill(
        self, batch: int = 64, *, mend: bool = False, share: Share = ALONE, progress: bool = True
    ) -> Trajectories:
        """As `Shards.fill`. Raises UserError for a trajectory that is not finite."""
        self.shards.fill(self._make, batch, mend=mend, share=share, progress=progress)
        return self

    def _make(self, indices: range) -> Rows:
        return _trajectory(self.family, self.source, self.settings, indices, self.device)

    def rows(self, indices: Sequence[int], device: Device = "cpu") -> Pairs:
        """The trajectories of these numbers, with their conditions."""
        rows = {name: tensor.to(device) for name, tensor in self.shards.rows(indices).items()}
        return Pairs(cond=_cond(self.family, self.source, indices, device), **rows)


def _cond(family: Family, source: Source, indices: Sequence[int], device: Device) -> Cond:
    examples, uses = [i % source.size for i in indices], [i // source.size for i in indices]
    told = family.prompts(source, examples, uses)
    return map_cond(lambda c: c.to(device), family.encode(told))


@torch.no_grad()
def _trajectory(
    family: Family, source: Source, settings: PairSettings, indices: range, device: Device
) -> dict[str, Tensor]:
    schedule, cond = family.schedule, _cond(family, source, indices, device)
    uncond = map_cond(lambda c: c.to(device), family.uncond(len(indices)))
    z = SampleNoise(indices, phase="pairs", device=device).randn(*family.shape)
    grid = schedule.teacher_grid(settings.steps)
    times = sorted({*grid, *settings.times}, reverse=True)
    x_t, states = schedule.first_state(z, times[0]), {}
    for number, t in enumerate(times):
        states[t] = x_t
        now = times_like(t, x_t)
        said = guided(family.teacher, x_t, now, cond, uncond, settings.guidance_scale)
        x_t = said.at(times_like(times[number + 1], x_t)) if number + 1 < len(times) else said.x0
    kept = [states[t] for t in settings.times]
    stacked = torch.stack(kept, 1) if kept else z.new_empty(len(z), 0, *family.shape)
    if not x_t.isfinite().all():
        raise UserError(
            f"the teacher's trajectories {indices[0]} to {indices[-1]} are not finite;"
            " raise method.pair_steps or lower method.guidance_scale."
        )
    return {"z": z.cpu(), "x0": x_t.float().cpu(), "states": stacked.float().cpu().contiguous()}
