"""What a roofline takes of a GPU, from data sheets; and of the CPU at hand, by trying it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

# Of peak numbers in a data sheet, what well-made training reaches; no run was measured on GPUs.
EFFICIENCY = 0.45
THIS_CPU = "this-cpu"
# Sides of the matrices that are multiplied; numbers that are copied; tries, of which the best counts.
SIDE, COPIED, TRIES = 1024, 1 << 25, 5


@dataclass(frozen=True)
class GPU:
    """Of one: memory in GB, dense tera-operations a second in half and single precision, memory bandwidth, and how many GB
    a second it sends within its machine and beyond; the part of these that training reaches.
    """

    memory: float
    half: float
    single: float
    bandwidth: float
    within: float
    beyond: float
    efficiency: float = EFFICIENCY


GPUS = {
    "h100-80g": GPU(80, 989, 67, 3350, 450, 50),
    "h200-141g": GPU(141, 989, 67, 4800, 450, 50),
    "b200-192g": GPU(192, 2250, 75, 8000, 900, 50),
    "a100-80g": GPU(80, 312, 19.5, 2039, 300, 25),
    "a100-40g": GPU(40, 312, 19.5, 1555, 300, 25),
    "l40s-48g": GPU(48, 362, 91.6, 864, 32, 12.5),
    "rtx4090-24g": GPU(24, 165, 82.6, 1008, 32, 3),
}


def this_cpu(clock: Callable[[], float] = time.perf_counter) -> GPU:
    """The CPU of this process, with the threads torch has, in a second or two: the best of a few products of matrices, and
    of a few copies, which are read and written. It talks to nobody.
    """
    import torch

    def seconds(does: Callable[[], object]) -> float:
        does()
        found = []
        for _ in range(TRIES):
            started = clock()
            does()
            found.append(clock() - started)
        return min(found)

    def products(dtype: torch.dtype) -> float:
        a, b = (torch.rand(SIDE, SIDE).to(dtype) for _ in range(2))
        return 2 * SIDE**3 / seconds(lambda: a @ b) / 1e12

    source, target = torch.rand(COPIED), torch.empty(COPIED)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    rates = products(torch.bfloat16), products(torch.float32)
    # What was measured is reached.
    return GPU(memory, *rates, bandwidth, bandwidth, bandwidth, efficiency=1.0)
