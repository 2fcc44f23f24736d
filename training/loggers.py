"""What a run writes down while it goes: metrics.jsonl always, TensorBoard if it is installed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.errors import atomic_write


class JsonlLogger:
    """One line of JSON per step, {"step": 10, "student/loss": 0.5, ...}; what is not finite becomes null.

    A run that goes on after `start_step` removes the later lines, which an interrupted run wrote after its
    last checkpoint, so no step is there twice.
    """

    def __init__(self, path: str | Path, start_step: int = 0) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if start_step and _step_of(line) <= start_step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, path: str | Path) -> None:
        """Nothing to do: the picture is a file already."""

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be half a line
        return math.inf


class TensorBoardLogger:
    """Scalars and previews as TensorBoard events. ImportError where tensorboard is not installed."""

    def __init__(self, folder: str | Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events at and after purge_step belong to an interrupted run.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def image(self, step: int, name: str, path: str | Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Loggers:
    """All loggers of a run at once; for the main process only.

    run_dir: the run directory. start_step: steps that are done already, 0 for a new run.
    """

    def __init__(self, run_dir: str | Path, start_step: int = 0) -> None:
        self._all: list[Any] = [JsonlLogger(Path(run_dir) / "metrics.jsonl", start_step)]
        with contextlib.suppress(ImportError):  # an optional package
            self._all.append(TensorBoardLogger(Path(run_dir) / "tensorboard", start_step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """values: plain numbers by name, "phase/term" for losses."""
        for logger in self._all:
            logger.log(step, values)

    def image(self, step: int, name: str, path: str | Path) -> None:
        """A picture that was written to `path`."""
        for logger in self._all:
            logger.image(step, name, path)

    def close(self) -> None:
        for logger in self._all:
            logger.close()
