"""What a run directory says of its run: `python -m training.show RUN`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError, cli_errors
from stepdistill.registry import add_allow_code, allowing_code

if TYPE_CHECKING:
    from training.checkpoint import RunDirectory
    from training.recipe import Recipe

# Lines of the log that the speed is taken from.
RECENT = 20


def describe(path: str | Path) -> list[str]:
    """Lines for people: state, last losses, health, best checkpoint, time left, disk.

    Raises:
        UserError: no run lies there, or its recipe cannot be read.
    """
    from training.checkpoint import RunDirectory
    from training.files import lines_of
    from training.recipe import load_recipe

    directory = RunDirectory(path)
    if not directory.recipe.is_file():
        raise UserError(f"{directory.path} is no run directory: it has no recipe.yaml.")
    recipe = load_recipe(directory.recipe)
    log = [line for line in lines_of(directory.metrics) if isinstance(line, dict) and "step" in line]
    lines = [line for line in log if "lr" in line]
    saved, total = directory.latest() or 0, recipe.total_steps
    step = max([saved, *(line["step"] for line in lines[-1:])])
    found = [
        ("run", f"{directory.path}: {' -> '.join(stage.method.name for stage in recipe.stages())}"),
        ("state", _state(directory, saved, total)),
        ("step", f"{step:,} of {total:,} ({step / total:.0%}), saved at {saved:,}"),
        ("left", _left(recipe, lines, total - step)),
        ("losses", _losses(lines)),
        *_health(recipe, lines),
        ("best", _best(directory, recipe, log)),
        ("disk", _disk(directory)),
    ]
    return [f"{name:<8}{text}" for name, text in found if text]


def _state(directory: RunDirectory, saved: int, total: int) -> str:
    if owner := directory.lock.held():
        age = time.time() - max(
            (path.stat().st_mtime for path in [directory.metrics] if path.exists()), default=time.time()
        )
        return f"at work (process {owner}), last line of its log {_duration(max(age, 0))} ago"
    if saved >= total and directory.finished(saved):
        return "finished"
    return f"not at work; the same command goes on from step {saved:,}"


def _left(recipe: Recipe, lines: list[dict[str, Any]], steps: int) -> str:
    """By the speed of the last lines: images a second, and images a step. Without previews, metrics and saves."""
    recent = [line for line in lines[-RECENT:] if line.get("images_per_second")]
    if steps <= 0 or len(recent) < 2:
        return ""
    images = (recent[-1]["samples"] - recent[0]["samples"]) / max(recent[-1]["step"] - recent[0]["step"], 1)
    speed = sum(line["images_per_second"] for line in recent) / len(recent)
    return f"about {_duration(steps * images / speed)} of computing" if images > 0 else ""


def _losses(lines: list[dict[str, Any]]) -> str:
    last = next((line for line in reversed(lines) if any(name.endswith("/total") for name in line)), {})
    shown = [f"{name} {_number(value)}" for name, value in last.items() if name.endswith("/total")]
    return f"{', '.join(shown)} (step {last['step']:,})" if shown else ""


def _health(recipe: Recipe, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each value as it was last, in the stage of the last line; those outside their range are marked."""
    from training.health import Health

    if not lines:
        return []
    offset, stage = 0, recipe.stages()[0]
    for each in recipe.stages():
        stage = each
        if lines[-1]["step"] <= offset + each.run.steps:
            break
        offset += each.run.steps
    health, latest = Health(stage.new_method(), stage.run.log_every), {}
    for line in lines:
        if line["step"] > offset:
            health.check({name: math.nan if value is None else value for name, value in line.items()})
            latest |= health.panel
    # Networks take turns, and a line has what is of its own.
    health.panel = latest
    return [("health" if i == 0 else "", text) for i, text in enumerate(health.lines())]


def _best(directory: RunDirectory, recipe: Recipe, log: list[dict[str, Any]]) -> str:
    metric = f"metric/{recipe.run.metric}"
    measured = [line for line in log if metric in line]
    last = f"; last {_number(measured[-1][metric])} at step {measured[-1]['step']:,}" if measured else ""
    best = directory.best()
    return f"step {best[0]:,}, {recipe.run.metric} = {best[1]:.4g}{last}" if best else ""


def _disk(directory: RunDirectory) -> str:
    """What lies there: at most `keep` checkpoints, the best one, and one while it is written."""
    sizes = {
        name: sum(file.stat().st_size for file in (directory.path / name).rglob("*") if file.is_file())
        for name in ("checkpoints", "previews", "student")
    }
    steps = ", ".join(f"{step:,}" for step in directory.steps()) or "none"
    return f"checkpoints of steps {steps}; " + ", ".join(
        f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items()
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.show",
        description="Say where a run is: its state, last losses, health, best checkpoint and the time that is left.",
    )
    parser.add_argument("run", help="a run directory, run.out of its recipe")
    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_args(arguments)
        with allowing_code(given.allow_code):
            print("\n".join(describe(given.run)))


if __name__ == "__main__":
    main()
