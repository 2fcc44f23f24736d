"""Seconds per image as a person waits for them: batch of one, whole path from prompt to pixels.

All samplers are measured in one process and in turns, so that a busy machine slows them alike and the ratios
stand. CPU seconds are kept beside the clock's: where they are far apart, something else was running.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.metrics.base import Inputs
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.sampling import ImageSampler

IMAGES = 10
STAGES = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Timed:
    """A sampler and the settings it is measured at."""

    sampler: ImageSampler
    steps: int
    guidance: float

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser per image; guidance outside the network counts twice."""
        return self.steps * self.sampler.calls(self.guidance)


class Latency:
    """`latency/...`: milliseconds per image, lower is better, and `speedup` over a teacher if given."""

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
    timed: Sequence[Timed], prompts: Sequence[str] | Sequence[int], images: int = IMAGES
) -> list[dict[str, float]]:
    """Time every entry on the same prompts and seeds, in turns, after one unmeasured image each.

    Returns, for each: `ms` (median of the whole), `ms_p90`, the medians `text_ms`, `denoise_ms`, `decode_ms`,
    `cpu_ms` (median of the process's CPU time), `nfe`, and `ms_per_call` (denoise_ms / nfe).
    """
    laps: list[dict[str, list[float]]] = [{} for _ in timed]
    for entry in timed:
        if entry.sampler.device.type == "cpu":
            entry.sampler.trace()  # as the app serves it
    for index in range(-1, images):
        prompt = prompts[max(index, 0) % len(prompts)]
        for entry, lap in zip(timed, laps, strict=True):
            timings: dict[str, float] = {}
            cpu, clock = time.process_time(), time.perf_counter()
            entry.sampler(
                [prompt],
                [max(index, 0)],
                steps=entry.steps,
                guidance_scale=entry.guidance,
                chunk=1,
                timings=timings,
            )
            timings["whole"], timings["cpu"] = time.perf_counter() - clock, time.process_time() - cpu
            if index >= 0:
                for name, seconds in timings.items():
                    lap.setdefault(name, []).append(1000 * seconds)
    return [_summary(entry, lap) for entry, lap in zip(timed, laps, strict=True)]


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
