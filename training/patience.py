"""When a run's metric has stopped getting better: `run.stop: patience`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from stepdistill.errors import atomic_write

# (step, metric, standard error, whether lower is better).
Measured = tuple[int, float | None, float | None, bool]


class Patience:
    """Counts measurements in a row that are no better than the best by more than both standard errors together.

    A measurement is a draw: of many that are equal one is always the best so far, by a little. What is within
    (se^2 + se_best^2)^(1/2) of the best is no progress; where a metric has no standard error, any gain is.

    allowed: so many in a row end the run; 0 = never.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed, self.waited = allowed, 0
        self.best: tuple[float, float] | None = None

    @property
    def over(self) -> bool:
        return bool(self.allowed) and self.waited >= self.allowed

    def see(self, value: float | None, se: float | None, lower_is_better: bool) -> None:
        """Take a measurement into account; one that is None or NaN is no progress."""
        if value is None or math.isnan(value):
            self.waited += 1
            return
        error = se if se is not None and math.isfinite(se) else 0.0
        best, best_error = self.best or (math.inf if lower_is_better else -math.inf, 0.0)
        gained = best - value if lower_is_better else value - best
        if gained > math.hypot(error, best_error):
            self.best, self.waited = (value, error), 0
        else:
            self.waited += 1


def record(path: Path, step: int, value: float, se: float | None, lower_is_better: bool) -> None:
    """Note a measurement in the file `path`, behind those of earlier steps; NaN is null."""
    numbers = [None if number is None or math.isnan(number) else number for number in (value, se)]
    rows = [one for one in recorded(path) if one[0] < step]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps([*rows, (step, *numbers, lower_is_better)]) + "\n", encoding="utf-8")


def recorded(path: Path) -> list[Measured]:
    """All measurements so far."""
    try:
        return [(step, value, se, lower) for step, value, se, lower in json.loads(path.read_text("utf-8"))]
    except (FileNotFoundError, ValueError):
        return []
