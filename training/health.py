"""The health panel: logged values that have a normal range, and the likely cause when one is left.

A method writes its ranges in `Method.health`; what is common to all methods is here. Losses of distillation
methods say little (a surrogate's value is zero by construction, a normalised tangent's is one), so a run is
watched by what does: moments of the images, the fake score's loss, gradients, the discriminator's accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepdistill.methods.base import Method

Ranges = Mapping[str, tuple[float, float, str]]

# The teacher's x0 are posterior means, which spread less than samples do: the ratio is above 1 in health.
COMMON: Ranges = {
    "student/x0_std_ratio": (
        0.6,
        2.5,
        "collapse below, saturation above: the fake score lags (train it more often or lower optim.student.lr),"
        " or guidance_scale is too high",
    ),
    "student/x0_shift": (
        -0.5,
        0.5,
        "brightness drift: the student outruns its fake score; raise method.student_every or lower optim.student.lr",
    ),
    "student/grad_norm_growth": (
        0.0,
        30.0,
        "divergence: lower optim.student.lr or set optim.max_grad_norm",
    ),
}


class Health:
    """Watches the values of one stage's log.

    Says each range's warning when it is left, not again until the value has been back inside.
    """

    def __init__(self, method: Method):
        self.ranges: dict[str, tuple[float, float, str]] = {**COMMON, **method.health}
        self.left: set[str] = set()
        self.first_norm: float | None = None
        self.panel: dict[str, float] = {}

    def derived(self, values: Mapping[str, float]) -> dict[str, float]:
        """What is judged but not logged by a method: student against teacher, and growth since the start."""
        found = {}
        if {"student/x0_std", "student/teacher_x0_std"} <= values.keys():
            spread = max(values["student/teacher_x0_std"], 1e-12)
            found["student/x0_std_ratio"] = values["student/x0_std"] / spread
            found["student/x0_shift"] = (
                values["student/x0_mean"] - values["student/teacher_x0_mean"]
            ) / spread
        if (norm := values.get("student/grad_norm_student")) is not None:
            self.first_norm = self.first_norm or norm
            if self.first_norm:
                found["student/grad_norm_growth"] = norm / self.first_norm
        return found

    def check(self, values: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """The derived values, and one warning for each range that has just been left."""
        derived, warnings = self.derived(values), []
        self.panel = {name: value for name, value in {**values, **derived}.items() if name in self.ranges}
        for name, value in self.panel.items():
            low, high, cause = self.ranges[name]
            if low <= value <= high:
                self.left.discard(name)
            elif name not in self.left:
                self.left.add(name)
                shown = "not finite" if not math.isfinite(value) else f"{value:.3g}"
                warnings.append(f"warning: {name} = {shown}, normally {low:g} to {high:g}: {cause}.")
        return derived, warnings

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must remember."""
        return {"first_norm": self.first_norm, "left": sorted(self.left)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first_norm, self.left = state["first_norm"], set(state["left"])

    def lines(self) -> list[str]:
        """The panel as text, a line a value; those outside their range are marked."""
        return [
            f"{'! ' if name in self.left else '  '}{name} {value:.3g} [{self.ranges[name][0]:g} to {self.ranges[name][1]:g}]"
            for name, value in sorted(self.panel.items())
        ]
