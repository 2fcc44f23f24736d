"""What huge pages that glibc keeps are worth on a CPU: training steps and one-step images with and without, in turns.

    python -m benchmarks.allocator          (some minutes; writes allocator.json)

A process reads GLIBC_TUNABLES when it starts, so each turn is a process of its own, of one thread; what is kept is the
least CPU time of a step within a turn, and the median of the turns. Linux with glibc; transparent huge pages have to be
"always" or "madvise" (/sys/kernel/mm/transparent_hugepage/enabled).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.students import MALLOC
from stepdistill import assets
from stepdistill.errors import atomic_write, quieten_libraries

STEPS = 12


def training(name: str, batch: int) -> Callable[[], None]:
    """Forward and backward of an embedded teacher's network."""
    import torch

    import stepdistill

    sampler = stepdistill.load(assets.path(name))
    network = sampler.denoiser.train().requires_grad_(True)
    cond = sampler.family_.encode(["a large red star on a black background"] * batch)
    x_t, t = torch.randn(batch, 4, 8, 8), torch.full((batch,), 0.5, dtype=torch.float64)

    def step() -> None:
        network(x_t, t, cond).x0.square().mean().backward()
        network.zero_grad()

    return step


def image() -> Callable[[], None]:
    """One image of the embedded student in one step, in a chunk filled up to 16."""
    import stepdistill

    sampler = stepdistill.load(assets.path("student"))
    return lambda: sampler(["a large red star on a black background"], [0], steps=1)


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    "unet, training step, batch 16": lambda: training("teacher", 16),
    "unet, training step, batch 64": lambda: training("teacher", 64),
    "transformer, training step, batch 16": lambda: training("transformer", 16),
    "transformer, training step, batch 64": lambda: training("transformer", 64),
    "student, one image in a chunk of 16": image,
}


def turn(case: str) -> float:
    """Milliseconds of CPU of one step, the least of some."""
    quieten_libraries()
    step, laps = CASES[case](), []
    for _ in range(STEPS):
        began = time.process_time()
        step()
        laps.append(time.process_time() - began)
    return 1e3 * min(laps)


def asked(case: str, tuned: bool) -> float:
    """`turn` in a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLIBC_TUNABLES": MALLOC if tuned else "",
    }
    command = [sys.executable, "-m", "benchmarks.allocator", "--turn", case]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of each, in turns (default: 5)")
    parser.add_argument("--turn", choices=list(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        print(turn(given.turn))
        return
    from evaluation.results import machine
    from stepdistill.provenance import git_commit

    cases: dict[str, dict[str, Any]] = {}
    for case in CASES:
        laps = [(asked(case, False), asked(case, True)) for _ in range(given.rounds)]
        plain, tuned = (statistics.median(column) for column in zip(*laps, strict=True))
        cases[case] = {"plain_ms": plain, "huge_ms": tuned, "ratio": plain / tuned, "turns": laps}
        print(f"{case:40} {plain:8.1f} ms {tuned:8.1f} ms  {plain / tuned:.2f}x", flush=True)
    about = {"processor": machine("cpu")["cpu"], "commit": git_commit(), "load_average": os.getloadavg()[0]}
    with atomic_write(Path(__file__).with_suffix(".json")) as temporary:
        temporary.write_text(
            json.dumps({"tunables": MALLOC, "cases": cases, "about": about}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
