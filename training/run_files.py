"""Where the parts of a run lie, and the small ones: its log, the best measurement, its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepdistill import card as cards
from stepdistill.errors import UserError, atomic_write
from training import saved
from training.disk import OnFullDisk, with_room
from training.files import lines_of


class RunFiles:
    """The paths of one run.

    Attributes:
        on_full_disk: whether a write that finds no room stops the run or waits.
    """

    def __init__(self, out: str | Path, on_full_disk: OnFullDisk = "stop") -> None:
        self.path = Path(out).expanduser()
        self.on_full_disk = on_full_disk
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.previews = self.path / "previews"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.results = self.path / "results"

    def put(self, path: Path, write: Callable[[Path], Any]) -> None:
        """`write` a file or directory below this one, which appears whole; where there is no room, wait if the run does."""

        def once() -> None:
            with atomic_write(path) as temporary:
                write(temporary)

        with_room(self.on_full_disk, f"writing {path}", once)

    def logged(self, step: int) -> dict[str, float | None]:
        """What the log has of `step`, by name; None was not finite."""
        found: dict[str, float | None] = {}
        for line in lines_of(self.metrics):
            if line.get("step") == step:
                found |= line
        return found

    def exported(self) -> int | None:
        """The step of the exported student, None without one that can be read."""
        try:
            return cards.read(self.student).step if self.student.is_dir() else None
        except UserError:
            return None

    def finish(self, step: int) -> None:
        """Note that nothing is left to do after `step`: measured, and exported where there is something to export."""
        self.put(self._end, lambda temporary: saved.write_json(temporary, {"step": step}))

    def finished(self, step: int) -> bool:
        """Whether `finish` was called for `step`, or its student lies here, which is written last."""
        try:
            return json.loads(self._end.read_text(encoding="utf-8"))["step"] == step
        except (OSError, ValueError, KeyError, TypeError):
            return self.exported() == step

    @property
    def _end(self) -> Path:
        return self.checkpoints / "finished.json"

    def best(self) -> tuple[int, float] | None:
        """(step, metric) of the best measurement so far."""
        try:
            best = json.loads((self.checkpoints / "best.json").read_text(encoding="utf-8"))
            return best["step"], best["metric"]
        except (FileNotFoundError, ValueError, KeyError):
            return None
