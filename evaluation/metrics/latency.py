"""Seconds per image as a person waits for them, and images per second as a server sees them.

Latency is of a batch of one, the whole path from prompt to pixels; throughput of a full batch.

All samplers are measured in one process and in turns, so that a busy machine slows them alike and the ratios
stand. CPU seconds are kept beside the clock's: where they are far apart, something else was running.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from evaluation.metrics.base import Inputs, Metric
from evaluation.values import Value, measured
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.drawing import Drawer

IMAGES = 10
# Images drawn at a time for the throughput.
BATCH = 16
_BATCHES = 3
STAGES = ("text", "denoise", "decode")


class Latency(Metric):
    """`latency/...`: milliseconds per image, lower is better; `throughput` and `speedup` over a teacher, if
    given, higher is better."""

    needs = frozenset({"timed"})
    values = (
        Value("latency/ms", better="lower", main=True),
        Value("latency/throughput", better="higher", main=True),
        Value("latency/speedup_denoise", better="higher", main=True),
        Value("latency/speedup", better="higher", main=True),
        *(
            Value(f"latency/{name}")
            for name in ("ms_p90", "cpu_ms", "nfe", "ms_per_call", "throughput_batch", "speedup_cpu")
        ),
        *(Value(f"latency/{stage}_ms") for stage in STAGES),
        *(Value(f"latency/throughput_{stage}_ms") for stage in STAGES),
    )

    def compute(self, inputs: Inputs) -> list[Value]:
        """Times of `inputs.timed[0]`; `inputs.timed[1]`, if there, is its teacher."""
        if not inputs.timed:
            raise UserError(
                "latency needs a sampler with known steps; measure it with `python -m evaluation run`."
            )
        return latencies(list(inputs.timed)[:2], inputs.captions or [0])[0]


def latencies(
    drawers: Sequence[Drawer],
    prompts: Sequence[str] | Sequence[int],
    images: int = IMAGES,
    batch: int = BATCH,
    teacher: int | None = 1,
) -> list[list[Value]]:
    """The values of `Latency` for every drawer, of the same prompts and seeds, in turns.

    One unmeasured image or batch of each comes first. `teacher` is the index of the one that the speed-ups of the
    others are over, if there are so many. A `batch` of 0 leaves the throughput out.
    """
    found = timings(drawers, prompts, images, batch)
    over = found[teacher] if teacher is not None and teacher < len(found) else None
    return [
        measured(
            Latency.values,
            {
                f"latency/{name}": number
                for name, number in (own | (speedups(own, over) if over and own is not over else {})).items()
            },
        )
        for own in found
    ]


def timings(
    drawers: Sequence[Drawer],
    prompts: Sequence[str] | Sequence[int],
    images: int = IMAGES,
    batch: int = BATCH,
) -> list[dict[str, float]]:
    """Time every drawer on the same prompts and seeds, in turns, after one unmeasured image or batch each.

    Returns, for each: `ms` (median of the whole), `ms_p90`, the medians `text_ms`, `denoise_ms`, `decode_ms`,
    `cpu_ms` (median of the process's CPU time), `nfe`, and `ms_per_call` (denoise_ms / nfe). With a `batch`
    above 0 also `throughput` (images per second, drawn `throughput_batch` at a time) and what an image then
    takes in each stage: `throughput_text_ms`, `throughput_denoise_ms` and `throughput_decode_ms`.
    """
    for drawer in drawers:
        if drawer.sampler.device.type == "cpu":
            # As the app serves it.
            drawer.sampler.trace()
    found = [_summary(one, lap) for one, lap in zip(drawers, _laps(drawers, prompts, images, 1), strict=True)]
    if batch > 0:
        for own, lap in zip(found, _laps(drawers, prompts, _BATCHES, batch), strict=True):
            own["throughput"] = 1000 * batch / statistics.median(lap["whole"])
            own["throughput_batch"] = float(batch)
            own |= {f"throughput_{stage}_ms": statistics.median(lap[stage]) / batch for stage in STAGES}
    return found


def _laps(
    drawers: Sequence[Drawer], prompts: Sequence[str] | Sequence[int], count: int, batch: int
) -> list[dict[str, list[float]]]:
    """Milliseconds of every stage, of the "whole" and of the "cpu", of `count` batches drawn in turns."""
    at_batch = [replace(drawer, chunk=batch) for drawer in drawers]
    laps: list[dict[str, list[float]]] = [{} for _ in drawers]
    for index in range(-1, count):
        first = max(index, 0) * batch
        seeds = range(first, first + batch)
        asked = [prompts[seed % len(prompts)] for seed in seeds]
        for draw, lap in zip(at_batch, laps, strict=True):
            seconds: dict[str, float] = {}
            cpu, clock = time.process_time(), time.perf_counter()
            draw(asked, seeds, timings=seconds)
            seconds["whole"], seconds["cpu"] = time.perf_counter() - clock, time.process_time() - cpu
            if index >= 0:
                for name, spent in seconds.items():
                    lap.setdefault(name, []).append(1000 * spent)
    return laps


def speedups(own: dict[str, float], teacher: dict[str, float]) -> dict[str, float]:
    """How many times faster than the teacher: end to end, and in the denoiser alone."""
    return {
        "speedup": teacher["ms"] / own["ms"],
        "speedup_denoise": teacher["denoise_ms"] / own["denoise_ms"],
        "speedup_cpu": teacher["cpu_ms"] / own["cpu_ms"],
    }


def _summary(drawer: Drawer, lap: dict[str, list[float]]) -> dict[str, float]:
    whole = sorted(lap["whole"])
    denoise = statistics.median(lap["denoise"])
    return {
        "ms": statistics.median(whole),
        "ms_p90": whole[min(len(whole) - 1, -(-9 * len(whole) // 10) - 1)],
        **{f"{stage}_ms": statistics.median(lap[stage]) for stage in STAGES},
        "cpu_ms": statistics.median(lap["cpu"]),
        "nfe": float(drawer.nfe),
        "ms_per_call": denoise / drawer.nfe,
    }
