"""Runs a module as `python -m` does and keeps an account of what it takes.

    python -m benchmarks.metered [--compared] FOLDER MODULE [ARGUMENTS]

FOLDER gets one file per process, written again every second, so that a kill loses no more than that of the account: CPU
seconds, the most memory, and of a training the iterations of each stage with their CPU seconds. Where the process that
asked for it is gone, the module is asked to end (SIGTERM), so that nothing goes on that nobody waits for.

How much a CPU second does depends on what else the machine does. With --compared a training of a latent family stops after
every second iteration for a plain forward and backward pass of its teacher, which says how much it was.
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
# In the place of a stage, and its batch.
PLAIN, BATCH = "plain", 16


def main() -> None:
    compared = sys.argv[1] == "--compared"
    folder, module, *arguments = sys.argv[1 + compared :]
    path, parent = Path(folder) / f"{time.time_ns()}.json", os.getppid()
    stages: dict[str, list[float]] = {}
    if module == "training.train":
        from training.trainer import Trainer

        Trainer.train_step = timed(Trainer.train_step, stages, compared)
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


def timed(
    step: Callable[[Any], None], stages: dict[str, list[float]], compared: bool
) -> Callable[[Any], None]:
    """`Trainer.train_step` that adds to `stages`, by number: iterations, those of them that are timed, and their CPU seconds."""
    plain: list[Callable[[], None]] = []

    @wraps(step)
    def measured(trainer: Any) -> None:
        _count(stages.setdefault(str(trainer.state.stage), [0, 0, 0.0]), lambda: step(trainer))
        if compared and trainer.state.step % 2 == 0:
            if not plain:
                plain.append(plain_pass(trainer.family))
            _count(stages.setdefault(PLAIN, [0, 0, 0.0]), plain[0])

    return measured


def _count(counts: list[float], does: Callable[[], None]) -> None:
    began = time.process_time()
    does()
    spent = time.process_time() - began
    counts[0] += 1
    if counts[0] > SETTLING:
        counts[1] += 1
        counts[2] += spent


def plain_pass(family: Any) -> Callable[[], None]:
    """A forward and backward pass of a copy of the family's teacher, for all its parameters."""
    import copy

    import torch

    teacher = copy.deepcopy(family.teacher).requires_grad_(True)
    made = torch.Generator().manual_seed(0)
    x_t = torch.randn(BATCH, *family.shape, generator=made)
    t = torch.full((BATCH,), 0.5 * family.schedule.t_max, dtype=torch.float64)
    cond = family.uncond(BATCH)

    def run() -> None:
        teacher(x_t, t, cond).raw.square().mean().backward()
        teacher.zero_grad(set_to_none=True)

    return run


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
