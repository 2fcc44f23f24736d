"""stepdistill: multi-step diffusion and flow teachers into 1-to-4-step students."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepdistill.denoiser import Denoiser, guided
    from stepdistill.drawing import Drawer, Sampler
    from stepdistill.errors import UserError
    from stepdistill.families import FAMILIES
    from stepdistill.loading import load
    from stepdistill.methods import METHODS
    from stepdistill.prediction import Prediction
    from stepdistill.sampling import Sampling
    from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow

__version__ = "0.1.0"

__all__ = [
    "EDM", "FAMILIES", "METHODS", "VP", "Denoiser", "Drawer", "Flow", "Prediction", "Sampler", "Sampling",
    "Schedule", "TrigFlow", "UserError", "guided", "load",
]  # fmt: skip

_HOMES = {
    "denoiser": ("Denoiser", "guided"),
    "drawing": ("Drawer", "Sampler"),
    "errors": ("UserError",),
    "families": ("FAMILIES",),
    "loading": ("load",),
    "methods": ("METHODS",),
    "prediction": ("Prediction",),
    "sampling": ("Sampling",),
    "schedule": ("EDM", "VP", "Flow", "Schedule", "TrigFlow"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for: a command's help and its refusals are quick."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
