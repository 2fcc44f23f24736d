"""What a run writes down while it goes, as accelerate's trackers: metrics.jsonl always, TensorBoard, W&B."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image

from stepdistill.errors import UserError, atomic_write


class JsonlTracker(GeneralTracker):
    """One line of JSON per step, {"step": 10, "student/loss": 0.5, ...}; what is not finite becomes null.

    A run that goes on after `start_step` removes the later lines, which an interrupted run wrote after its
    last checkpoint, so no step is there twice.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: str | Path, start_step: int = 0) -> None:
        super().__init__()
        self.path, self.start_step = Path(path), start_step
        self._file: TextIO | None = None

    @property
    def tracker(self) -> TextIO | None:
        """The open file."""
        return self._file

    def start(self) -> None:
        """Open the file, without the lines that are to be written again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if self.start_step and _step_of(line) <= self.start_step]
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """values: plain numbers by name, "phase/term" for losses."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Nothing to do: the picture is a file already."""

    def finish(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # The last line of a killed run may be half a line.
        return math.inf


def check_trackers(names: Sequence[str]) -> None:
    """UserError when W&B is asked for and not installed."""
    if "wandb" in names and not is_wandb_available():
        raise UserError("run.trackers names wandb, which is not installed; install it or leave it out.")


def trackers(run_dir: str | Path, names: Sequence[str] = (), start_step: int = 0) -> list[GeneralTracker]:
    """The trackers of a run, for `Accelerator.log_with`; `init_trackers` starts them.

    Args:
        names: of "tensorboard" and "wandb"; TensorBoard is left out where it is not installed.
        start_step: steps that are done already, 0 for a new run.
    """
    run_dir = Path(run_dir)
    made: list[GeneralTracker] = [JsonlTracker(run_dir / "metrics.jsonl", start_step)]
    if "tensorboard" in names and is_tensorboard_available():
        # Events at and after purge_step belong to an interrupted run.
        purge = start_step + 1 if start_step else 0
        made.append(TensorBoardTracker("tensorboard", run_dir, purge_step=purge))
    if "wandb" in names:
        # Nothing leaves the machine unless one asks for it; `wandb sync` sends it later.
        mode = os.environ.get("WANDB_MODE", "offline")
        made.append(WandBTracker("stepdistill", name=run_dir.name, dir=str(run_dir), mode=mode))
    return made


def log_picture(all_trackers: list[GeneralTracker], name: str, path: Path, step: int) -> None:
    """Show a picture that was written to `path` in every tracker that can."""
    with Image.open(path, formats=("PNG",)) as image:
        pixels = np.asarray(image.convert("RGB"))[None]
    for tracker in all_trackers:
        extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step, **extra)
