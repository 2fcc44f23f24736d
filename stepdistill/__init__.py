"""stepdistill: multi-step diffusion and flow teachers into 1-to-4-step students."""

from __future__ import annotations

__version__ = "0.1.0"

from stepdistill.denoiser import Denoiser, guided
from stepdistill.drawing import Drawer, Sampler
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.loading import load
from stepdistill.methods import METHODS
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow

__all__ = [
    "EDM", "FAMILIES", "METHODS", "VP", "Denoiser", "Drawer", "Flow", "Prediction", "Sampler", "Sampling",
    "Schedule", "TrigFlow", "UserError", "guided", "load",
]  # fmt: skip
