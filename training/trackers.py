"""What a run writes down while it goes, as accelerate's trackers: metrics.jsonl always, TensorBoard, W&B."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image

from stepdistill.errors import UserError, atomic_write
from training.disk import OnFullDisk, with_room


class JsonlTracker(GeneralTracker):
    """One line of JSON per step, {"step": 10, "student/loss": 0.5, ...}; what is not finite becomes null.

    A run that goes on after `start_step` removes the later lines, which an interrupted run wrote after its
    last checkpoint, so no step is there twice.

    full_disk: what `log` does where there is no room, see `training.disk`; half a line never stays.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: str | Path, start_step: int = 0, full_disk: OnFullDisk = "stop") -> None:
        super().__init__()
        self.path, self.start_step, self.full_disk = Path(path), start_step, full_disk
        self._file: BinaryIO | None = None

    @property
    def tracker(self) -> BinaryIO | None:
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
        # Unbuffered: what was not written is not tried again behind one's back.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        """values: plain numbers by name, "phase/term" for losses."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        with_room(self.full_disk, f"writing {self.path}", lambda: self._append(line.encode()))

    def _append(self, line: bytes) -> None:
        """All of it or nothing."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

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


def trackers(
    run_dir: str | Path, names: Sequence[str] = (), start_step: int = 0, full_disk: OnFullDisk = "stop"
) -> list[GeneralTracker]:
    """The trackers of a run, for `Accelerator.log_with`; `init_trackers` starts them.

    Args:
        names: of "tensorboard" and "wandb"; TensorBoard is left out where it is not installed.
        start_step: steps that are done already, 0 for a new run.
        full_disk: what metrics.jsonl does where there is no room.
    """
    run_dir = Path(run_dir)
    made: list[GeneralTracker] = [JsonlTracker(run_dir / "metrics.jsonl", start_step, full_disk)]
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
