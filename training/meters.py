"""Means of what a run observes, from one line of its log to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Meters:
    """Sums and counts by name, "phase/value".

    Attributes:
        sums: [sum, count] of every name since the last `reset`; part of a checkpoint.
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """One more value of `name`."""
        entry = self.sums.setdefault(name, [0.0, 0])
        entry[0] += value
        entry[1] += 1

    def miss(self, name: str) -> None:
        """`name` would have had a value, and it counts for nothing: processes keep the same names."""
        self.sums.setdefault(name, [0.0, 0])

    def share(self, accelerator: Accelerator) -> None:
        """Give every process the mean over processes of what each has observed. All of them call it."""
        if accelerator.num_processes == 1 or not self.sums:
            return
        table = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=accelerator.device)
        self.sums = dict(zip(self.sums, accelerator.reduce(table, "mean").tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """The mean of each name."""
        return {name: total / count for name, (total, count) in self.sums.items() if count}

    def total(self, ending: str) -> float:
        """The sum of all values whose names end so."""
        return sum(total for name, (total, _) in self.sums.items() if name.endswith(ending))

    def reset(self) -> None:
        """Begin anew, after a line of the log."""
        self.sums = {}
