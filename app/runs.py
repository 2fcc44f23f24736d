"""Training runs for the page: the log of a run directory as it grows, its health, previews and what is left of it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.yaml_files import read_yaml

# Bytes of a log that are read from its end, and points of a curve.
TAIL = 4 << 20
POINTS = 200
PREVIEWS = 12


def read(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """What each run says of itself, in the order given."""
    return [_run(path) for path in directories]


def preview(directories: Sequence[Path], run: int, at: int) -> Path | None:
    """The file of a preview by the number of its run and its own, as `read` lists them."""
    if not (0 <= run < len(directories)):
        return None
    files = _previews(directories[run])
    return files[at] if 0 <= at < len(files) else None


def _run(path: Path) -> dict[str, Any]:
    recipe, rows = _recipe(path), _rows(path / "metrics.jsonl")
    names = sorted({name for row in rows for name in row} - {"step"})
    losses = [name for name in names if name.endswith("/total") or name.startswith("metric/")]
    last = rows[-1] if rows else {}
    total = _total_steps(recipe)
    age = time.time() - (path / "metrics.jsonl").stat().st_mtime if rows else None
    return {
        "name": path.name,
        "method": str(_section(recipe, "method").get("name", "")),
        "step": last.get("step"),
        "of": total,
        "age": age,
        "eta": _left(rows, total, path) if age is not None and age < 600 else None,
        "curves": {name: _curve(rows, name) for name in losses},
        "health": _health(recipe, last),
        "previews": [file.stem for file in _previews(path)],
    }


def _previews(path: Path) -> list[Path]:
    folder = path / "previews"
    files = sorted(file for file in folder.glob("*.png") if file.resolve().parent == folder.resolve())
    return files[-PREVIEWS:]


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - TAIL))
            lines = opened.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Half a line, where the tail begins or the run is writing.
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path / "recipe.yaml")
    except UserError:
        return {}


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """Its section of that name; {} where there is none, or something else."""
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


def _total_steps(recipe: dict[str, Any]) -> int | None:
    """Of all stages: one that says nothing has the recipe's own number."""
    own = _section(recipe, "run").get("steps")
    stages = recipe.get("stages")
    stages = stages if stages and isinstance(stages, list) else [{}]
    counts = [_section(stage, "run").get("steps", own) for stage in stages if isinstance(stage, dict)]
    return sum(counts) if counts and all(isinstance(count, int) for count in counts) else None


def _left(rows: list[dict[str, Any]], total: int | None, path: Path) -> float | None:
    """Seconds to the end, by the pace since the recipe was written."""
    done = rows[-1]["step"]
    if not total or not done or done >= total:
        return None
    try:
        spent = (path / "metrics.jsonl").stat().st_mtime - (path / "recipe.yaml").stat().st_mtime
    except OSError:
        return None
    return spent / done * (total - done) if spent > 0 else None


def _curve(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
    points = [[row["step"], row[name]] for row in rows if isinstance(row.get(name), (int, float))]
    return points[:: math.ceil(len(points) / POINTS)] if points else []


def _health(recipe: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    """The last values that have a normal range, with it, and the likely cause where it is left."""
    ranges, panel = _ranges(recipe), []
    for name, value in sorted(last.items()):
        known = ranges.get(name) or ranges.get(re.sub("^student/.*/", "student/", name))
        if known is not None:
            low, high, cause = known
            good = isinstance(value, (int, float)) and low <= value <= high
            row = {"name": name, "value": value, "low": low, "high": high, "good": good, "cause": cause}
            panel.append({key: _plain(each) for key, each in row.items()})
    return panel


def _plain(value: Any) -> Any:
    """JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ranges(recipe: dict[str, Any]) -> dict[str, tuple[float, float, str]]:
    from stepdistill.methods import EVERY_METHOD
    from stepdistill.methods.base import COMMON_HEALTH
    from stepdistill.registry import resolve

    try:
        name = _section(recipe, "method").get("name")
        method = resolve(name, EVERY_METHOD, "method", registered_only=True)
    except UserError:
        return COMMON_HEALTH
    return COMMON_HEALTH | getattr(method, "health", {})
