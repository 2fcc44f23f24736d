"""How far the scores' recent means go in runs: what the normal ranges of stepdistill/methods/ranges.py were chosen by.

    python -m benchmarks.health runs/fair/10/*/run broken=runs/broken     (adds to health.json; trains nothing)

A run is a folder with recipe.yaml and metrics.jsonl, named as it lies or NAME=FOLDER. Of every stage with a fake score:
its method, iterations, learning rates, the least and the most of each mean over 200 iterations, and what the panel says.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.students import ROOT, read, write
from stepdistill.errors import UserError, cli_errors
from training.files import lines_of
from training.health import Health
from training.recipe import Recipe, load_recipe

OUT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders of runs")
    args = parser.parse_args()
    with cli_errors():
        found = read(OUT) or {}
        for given in args.runs:
            name, _, folder = given.rpartition("=")
            rows = list(stages_of(Path(folder)))
            if rows:
                found[name or os.path.relpath(folder, ROOT)] = rows
        write(OUT, dict(sorted(found.items())))


def stages_of(run: Path) -> Iterator[dict[str, Any]]:
    """A row of each stage that logs how two scores stand to each other, as far as the run has come."""
    for part in ("recipe.yaml", "metrics.jsonl"):
        if not (run / part).is_file():
            raise UserError(f"there is no {run / part}; name the folder of a run.")
    stages = load_recipe(run / "recipe.yaml").stages()
    ends = list(itertools.accumulate(stage.run.steps for stage in stages))
    for stage, begin, end in zip(stages, [0, *ends], ends, strict=False):
        lines = [line for line in lines_of(run / "metrics.jsonl") if begin < line.get("step", 0) <= end]
        if row := judged(stage, lines, begin):
            yield row


def judged(stage: Recipe, lines: list[dict[str, Any]], begin: int) -> dict[str, Any] | None:
    health = Health(stage.new_method(), stage.run.log_every)
    ranges: dict[str, list[float]] = {}
    said: list[str] = []
    for line in lines:
        # A number that was none is null there.
        values = {name: math.nan if value is None else value for name, value in line.items()}
        derived, warnings = health.check({name: value for name, value in values.items() if "/" in name})
        said += [f"{line['step'] - begin}: {warning}" for warning in warnings if "_recent" in warning]
        for name, value in derived.items():
            if name.endswith("_recent"):
                low, high = ranges.setdefault(name, [value, value])
                ranges[name] = [min(low, value), max(high, value)]
    if not ranges:
        return None
    rates = {name: stage.optim.for_network(name).lr for name in ("student", "fake_score")}
    about = {
        "method": stage.method.name,
        "iterations": lines[-1]["step"] - begin,
        "of": stage.run.steps,
        "batch_size": stage.optim.batch_size,
        "schedule": stage.optim.schedule,
        "seed": stage.run.seed,
    }
    return (
        about
        | {"lr": rates, "said": said}
        | {name: [round(x, 3) for x in each] for name, each in ranges.items()}
    )


if __name__ == "__main__":
    main()
