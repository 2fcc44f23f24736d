"""The time that `training.plan --gpu this-cpu` says of an iteration beside what it takes, in one process with one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_time [NAME ...]

The cases are those of benchmarks/memory.py. Both sides are seconds of this process's CPU, so that other programs count
little: the probe of the CPU, and the least of the iterations after the first. What was measured before stays in the table.
Results: benchmarks/plan_time.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from benchmarks.memory import CASES, Enough, pipeline, recipe
from stepdistill.errors import atomic_write, quieten_libraries
from stepdistill.provenance import git_commit

TABLE = Path(__file__).with_suffix(".json")
ITERATIONS = 3


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Planned and taken seconds of an iteration of the case."""
    from training.forecast import forecast
    from training.hardware import this_cpu
    from training.plan import way
    from training.recipe import recipe_from
    from training.run import build, run
    from training.trainer import Trainer

    said = recipe(CASES[name], folder)
    said["run"] = said["run"] | {
        "steps": ITERATIONS,
        "save_minutes": 0,
        "out": str(folder / f"run-{len(name)}"),
    }
    wanted = recipe_from(said)
    family, sources = build(wanted)
    known = forecast(wanted, family, sources[0])
    cpu = this_cpu(time.process_time)
    planned = way("one process", known, wanted.stages()[0], 1, cpu).seconds
    taken, step = [], Trainer.train_step

    def timed(trainer: Trainer) -> None:
        started = time.process_time()
        step(trainer)
        taken.append(time.process_time() - started)
        if len(taken) == ITERATIONS:
            raise Enough

    Trainer.train_step = timed
    try:
        with contextlib.suppress(Enough):
            run(wanted)
    finally:
        Trainer.train_step = step
    least = min(taken[1:])
    rates = {"single": cpu.single * 1e3, "half": cpu.half * 1e3, "bandwidth": cpu.bandwidth}
    found = {"planned": planned, "taken": least, "ratio": planned / least, **rates}
    return {key: round(value, 3) for key, value in found.items()}


def main() -> None:
    quieten_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for shape in ("sdxl", "flux"):
            pipeline(shape, folder / shape)
        for name in sys.argv[1:] or CASES:
            # Each has a precision of its own.
            AcceleratorState._reset_state(True)
            row = measured(name, folder) | {"commit": git_commit(short=True)}
            print(name, row, flush=True)
            kept = json.loads(TABLE.read_text())["cases"] if TABLE.is_file() else {}
            units = {
                "planned": "s",
                "taken": "s",
                "single": "Gflop/s",
                "half": "Gflop/s",
                "bandwidth": "GB/s",
            }
            with atomic_write(TABLE) as path:
                path.write_text(json.dumps({"units": units, "cases": kept | {name: row}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
