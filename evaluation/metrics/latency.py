"""Seconds per image as a person waits for them, and images per second as a server sees them.

Latency is of a batch of one, the whole path from prompt to pixels; throughput of a full batch.

All samplers are measured in one process and in turns, so that a busy machine slows them alike and the ratios
stand. CPU seconds are kept beside the clock's: where they are far apart, something else was running.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.metrics.base import Inputs, Metric
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.drawing import Sampler

IMAGES = 10
BATCH = 16  # images drawn at a time for the throughput
_BATCHES = 3
STAGES = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Timed:
    """A sampler and the settings it is measured at."""

    sampler: Sampler
    steps: int
    guidance: float

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser per image; guidance outside the network counts twice."""
        return self.steps * self.sampler.calls(self.guidance)


class Latency(Metric):
    """`latency/...`: milliseconds per image, lower is better; `throughput` and `speedup` over a teacher, if
    given, higher is better."""

    needs = frozenset({"timed", "captions"})

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """Times of `inputs.timed[0]`; `inputs.timed[1]`, if there, is its teacher."""
        if not inputs.timed:
            raise UserError(
                "latency needs a sampler with known steps; measure it with `python -m evaluation run`."
            )
        own, *teacher = measure(list(inputs.timed)[:2], inputs.captions)
        found = {f"latency/{name}": value for name, value in own.items()}
        for name, value in speedups(own, teacher[0]).items() if teacher else ():
            found[f"latency/{name}"] = value
        return found


def measure(
    timed: Sequence[Timed],
    prompts: Sequence[str] | Sequence[int],
    images: int = IMAGES,
    batch: int = BATCH,
) -> list[dict[str, float]]:
    """Time every entry on the same prompts and seeds, in turns, after one unmeasured image or batch each.

    Returns, for each: `ms` (median of the whole), `ms_p90`, the medians `text_ms`, `denoise_ms`, `decode_ms`,
    `cpu_ms` (median of the process's CPU time), `nfe`, and `ms_per_call` (denoise_ms / nfe). With a `batch`
    above 0 also `throughput` (images per second, drawn `throughput_batch` at a time) and what an image then
    takes in each stage: `throughput_text_ms`, `throughput_denoise_ms` and `throughput_decode_ms`.
    """
    for entry in timed:
        if entry.sampler.device.type == "cpu":
            entry.sampler.trace()  # as the app serves it
    found = [_summary(entry, lap) for entry, lap in zip(timed, _laps(timed, prompts, images, 1), strict=True)]
    if batch > 0:
        for own, lap in zip(found, _laps(timed, prompts, _BATCHES, batch), strict=True):
            own["throughput"] = 1000 * batch / statistics.median(lap["whole"])
            own["throughput_batch"] = float(batch)
            own |= {f"throughput_{stage}_ms": statistics.median(lap[stage]) / batch for stage in STAGES}
    return found


def _laps(
    timed: Sequence[Timed], prompts: Sequence[str] | Sequence[int], count: int, batch: int
) -> list[dict[str, list[float]]]:
    """Milliseconds of every stage, of the "whole" and of the "cpu", of `count` batches drawn in turns."""
    laps: list[dict[str, list[float]]] = [{} for _ in timed]
    for index in range(-1, count):
        first = max(index, 0) * batch
        seeds = range(first, first + batch)
        asked = [prompts[seed % len(prompts)] for seed in seeds]
        for entry, lap in zip(timed, laps, strict=True):
            timings: dict[str, float] = {}
            cpu, clock = time.process_time(), time.perf_counter()
            entry.sampler(
                asked, seeds, steps=entry.steps, guidance_scale=entry.guidance, chunk=batch, timings=timings
            )
            timings["whole"], timings["cpu"] = time.perf_counter() - clock, time.process_time() - cpu
            if index >= 0:
                for name, seconds in timings.items():
                    lap.setdefault(name, []).append(1000 * seconds)
    return laps


def speedups(own: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """How many times faster than the teacher: end to end, and in the denoiser alone."""
    return {
        "speedup": teacher["ms"] / own["ms"],
        "speedup_denoise": teacher["denoise_ms"] / own["denoise_ms"],
        "speedup_cpu": teacher["cpu_ms"] / own["cpu_ms"],
    }


def _summary(entry: Timed, lap: dict[str, list[float]]) -> dict[str, float]:
    whole = sorted(lap["whole"])
    denoise = statistics.median(lap["denoise"])
    return {
        "ms": statistics.median(whole),
        "ms_p90": whole[min(len(whole) - 1, -(-9 * len(whole) // 10) - 1)],
        **{f"{stage}_ms": statistics.median(lap[stage]) for stage in STAGES},
        "cpu_ms": statistics.median(lap["cpu"]),
        "nfe": float(entry.nfe),
        "ms_per_call": denoise / entry.nfe,
    }
