"""Ways of leaving out a network's Python: the embedded student at batch 1 on one CPU thread, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.tracing          (a minute; writes tracing.json)

plain: the network as diffusers runs it. jit.trace: what `stepdistill.tracing` records. export: `torch.export`, its
graph as a module. compile eager, compile aot_eager: `torch.compile` without a code generator, so that the kernels
stay the same. Times are CPU time of one call of the network; the first call, which records, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepdistill
from evaluation.results import machine
from stepdistill import assets
from stepdistill.errors import atomic_write, quieten_libraries

PROMPT = "a large red star on a black background"


def call_of(sampler: Any) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """The network of a sampler, and what it is called with to draw one image."""
    network, asked = sampler.denoiser.network, []
    hook = network.register_forward_pre_hook(lambda _, given: asked.append(given))
    sampler([PROMPT], [0], steps=1)
    hook.remove()
    return network, asked[0]


def ways(network: torch.nn.Module, given: tuple[Tensor, ...]) -> dict[str, Callable[[], Callable]]:
    """How each is made."""
    return {
        "plain": lambda: network,
        "jit.trace": lambda: torch.jit.trace(network, given, check_trace=False),
        "export": lambda: torch.export.export(network, given, strict=False).module(),
        "compile eager": lambda: torch.compile(network, backend="eager"),
        "compile aot_eager": lambda: torch.compile(network, backend="aot_eager"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=Path(__file__).with_suffix(".json"), type=Path)
    parser.add_argument("--rounds", type=int, default=60, help="calls of each, in turns (default: 60)")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1, so that each has one thread")

    quieten_libraries()
    # One per Python branch on a shape.
    warnings.simplefilter("ignore", torch.jit.TracerWarning)
    network, given = call_of(stepdistill.load(assets.path("student")))
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, Callable] = {}
    with torch.no_grad():
        expected = network(*given)
        for name, make in ways(network, given).items():
            began = time.process_time()
            made[name] = make()
            equal = torch.equal(made[name](*given), expected)
            found[name] = {"bit_equal": equal, "first_call_cpu_s": time.process_time() - began}
        laps: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(args.rounds):
            for name, call in made.items():
                began = time.process_time()
                call(*given)
                laps[name].append(time.process_time() - began)
    plain = statistics.median(laps["plain"])
    for name, times in laps.items():
        found[name] |= {
            "cpu_ms": 1e3 * statistics.median(times),
            "of_plain": statistics.median(times) / plain,
        }
    results = {
        "what": "one call of the embedded student's network, batch 1, float32, one CPU thread; medians in turns of CPU time",
        "rounds": args.rounds,
        "ways": found,
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "processor": machine("cpu")["cpu"],
    }
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    for name, row in found.items():
        print(f"{name:18} {row['cpu_ms']:7.2f} ms  {row['of_plain']:.3f} of plain  bit-equal: {row['bit_equal']}"
              f"  first call {row['first_call_cpu_s']:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
