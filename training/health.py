"""The health panel: logged values that have a normal range, and the likely cause when one is left.

A method writes its ranges in `Method.health`; what is common to all methods stands beside it. Losses of distillation
methods say little (a surrogate's value is zero by construction, a normalised tangent's is one, a critic's falls whether it
follows or not), so a run is watched by what does: moments of the images, how teacher and fake score stand to each other,
gradients, the discriminator's accuracy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from stepdistill.methods.base import COMMON_HEALTH as COMMON
from stepdistill.methods.base import Method

# Judged by its growth over the first value logged.
GROWING = "grad_norm_student"
# A range of NAME_recent is of NAME's mean over so many iterations.
RECENT = 200


class Health:
    """Watches the values of one stage's log.

    Says each range's warning when it is left, not again until the value has been back inside.

    Args:
        log_every: iterations from one line of the log to the next, at least 1.
    """

    def __init__(self, method: Method, log_every: int = 1):
        self.ranges: dict[str, tuple[float, float, str]] = {**COMMON, **method.health}
        # Lines of the log.
        self.window = max(RECENT // log_every, 1)
        self.left: set[str] = set()
        self.first: dict[str, float] = {}
        self.recent: dict[str, list[float]] = {}
        self.panel: dict[str, float] = {}

    def range_of(self, name: str) -> tuple[float, float, str] | None:
        """The normal range of a logged value. "student/part/value" of a composition has what all students have."""
        common = re.sub("^student/.*/", "student/", name)
        return self.ranges.get(name) or COMMON.get(common)

    def derived(self, values: Mapping[str, float]) -> dict[str, float]:
        """What is judged but not logged by a method: student against teacher, growth since the start, and recent means.

        A recent mean is there once there are lines enough for it.
        """
        derived = {}
        for name, value in values.items():
            where, _, what = name.rpartition("/")
            if what == "x0_std" and f"{where}/teacher_x0_std" in values:
                spread = max(values[f"{where}/teacher_x0_std"], 1e-12)
                shift = values[f"{where}/x0_mean"] - values[f"{where}/teacher_x0_mean"]
                derived[f"{where}/x0_std_ratio"], derived[f"{where}/x0_shift"] = (
                    value / spread,
                    shift / spread,
                )
            if what == GROWING and (first := self.first.setdefault(name, value)):
                derived[f"{where}/{what.removesuffix('_student')}_growth"] = value / first
            if self.range_of(f"{name}_recent"):
                recent = self.recent[name] = [*self.recent.get(name, []), value][-self.window :]
                if len(recent) == self.window:
                    derived[f"{name}_recent"] = sum(recent) / self.window
        return derived

    def check(self, values: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """The derived values, and one warning for each range that has just been left."""
        derived, warnings = self.derived(values), []
        judged = {name: value for name, value in {**values, **derived}.items() if self.range_of(name)}
        # What is looked at less often stays on the panel as it was.
        self.panel |= judged
        for name, value in judged.items():
            low, high, cause = self.range_of(name)
            if low <= value <= high:
                self.left.discard(name)
            elif name not in self.left:
                self.left.add(name)
                shown = "not finite" if not math.isfinite(value) else f"{value:.3g}"
                warnings.append(f"{name} = {shown}, normally {low:g} to {high:g}: {cause}.")
        return derived, warnings

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must remember."""
        return {"first": self.first, "recent": self.recent, "left": sorted(self.left), "panel": self.panel}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.first, self.left = dict(state.get("first", {})), set(state["left"])
        self.recent, self.panel = dict(state.get("recent", {})), dict(state.get("panel", {}))

    def lines(self) -> list[str]:
        """The panel as text, a line a value; those outside their range are marked."""
        lines = []
        for name, value in sorted(self.panel.items()):
            low, high, _ = self.range_of(name)
            mark = "! " if name in self.left else "  "
            lines.append(f"{mark}{name} {value:.3g} [{low:g} to {high:g}]")
        return lines
