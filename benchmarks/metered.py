"""Runs a module as `python -m` does and keeps an account of what it takes.

    python -m benchmarks.metered FOLDER MODULE [ARGUMENTS]

FOLDER gets one file per process, written again every second, so that a kill loses no more than that of the account: CPU
seconds, the most memory, and of a training the iterations of each stage with their CPU seconds. Where the process that
asked for it is gone, the module is asked to end (SIGTERM), so that nothing goes on that nobody waits for.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from stepdistill.errors import atomic_write

EVERY = 1.0
# The first iterations of a stage make what later ones find: buffers, kernels' plans, optimiser states.
SETTLING = 2


def main() -> None:
    folder, module, *arguments = sys.argv[1:]
    path, parent = Path(folder) / f"{time.time_ns()}.json", os.getppid()
    stages: dict[str, list[float]] = {}
    if module == "training.train":
        from training.trainer import Trainer

        Trainer.train_step = timed(Trainer.train_step, stages)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            write(path, stages)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        over.set()
        thread.join()
        write(path, stages)


def timed(step: Callable[[Any], None], stages: dict[str, list[float]]) -> Callable[[Any], None]:
    """`Trainer.train_step` that adds to `stages`, by number: iterations, those of them that are timed, and their CPU seconds."""

    @wraps(step)
    def measured(trainer: Any) -> None:
        began = time.process_time()
        step(trainer)
        spent = time.process_time() - began
        counts = stages.setdefault(str(trainer.state.stage), [0, 0, 0.0])
        counts[0] += 1
        if counts[0] > SETTLING:
            counts[1] += 1
            counts[2] += spent

    return measured


def write(path: Path, stages: dict[str, list[float]]) -> None:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    said = {
        "cpu_seconds": sum(used.ru_utime + used.ru_stime for used in (own, children)),
        "peak_mib": own.ru_maxrss / 1024,
        "stages": stages,
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(said) + "\n")


def account(folder: Path) -> dict[str, Any]:
    """Of all processes with a file in `folder`: CPU seconds, the most memory of one, and by stage the iterations that were
    timed with their CPU seconds.
    """
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    timings: dict[str, list[float]] = {}
    for file in files:
        for stage, (_, count, seconds) in file["stages"].items():
            before = timings.get(stage, (0, 0.0))
            timings[stage] = [before[0] + count, before[1] + seconds]
    return {
        "cpu_seconds": sum(file["cpu_seconds"] for file in files),
        "peak_mib": max((file["peak_mib"] for file in files), default=0.0),
        "stages": timings,
    }


if __name__ == "__main__":
    main()
