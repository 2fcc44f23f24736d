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

from evaluation.metrics.base import Metric
from evaluation.settings import Settings
from evaluation.values import Value, measured

if TYPE_CHECKING:
    from stepdistill.drawing import Drawer

IMAGES, BATCH = Settings.latency_images, Settings.throughput_batch
_BATCHES = 3
STAGES = ("text", "denoise", "decode")


class Latency(Metric):
    """`latency/...`: milliseconds per image, lower is better; `throughput` and `speedup` over a teacher, if
    given, higher is better. It is of what draws, not of a set: `latencies` has the values.
    """

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


def latencies(
    drawers: Sequence[Drawer],
    prompts: Sequence[str] | Sequence[int],
    images: int = IMAGES,
    batch: int = BATCH,
    teacher: int | None = 1,
) -> list[list[Value]]:
    """The values of `Latency` for every drawer, of the same prompts and seeds, in turns.

    teacher: index of the one that the speed-ups of the others are over, if there are so many. The others: see `timings`.
    """
    laps = timings(drawers, prompts, images, batch)
    if teacher is not None and teacher < len(laps):
        over = laps[teacher]
        for own in laps[:teacher] + laps[teacher + 1 :]:
            times = {"speedup": "ms", "speedup_denoise": "denoise_ms", "speedup_cpu": "cpu_ms"}
            own |= {name: over[time] / own[time] for name, time in times.items()}
    return [
        measured(Latency.values, {f"latency/{name}": number for name, number in own.items()}) for own in laps
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
    times: list[dict[str, float]] = []
    for drawer, lap in zip(drawers, _laps(drawers, prompts, images, 1), strict=True):
        whole, middle = sorted(lap["whole"]), {name: statistics.median(lap[name]) for name in lap}
        own = {"ms": middle["whole"], "ms_p90": whole[-(-9 * len(whole) // 10) - 1]}
        own |= {f"{stage}_ms": middle[stage] for stage in (*STAGES, "cpu")}
        times.append(own | {"nfe": float(drawer.nfe), "ms_per_call": middle["denoise"] / drawer.nfe})
    if batch > 0:
        for own, lap in zip(times, _laps(drawers, prompts, _BATCHES, batch), strict=True):
            own["throughput"] = 1000 * batch / statistics.median(lap["whole"])
            own["throughput_batch"] = float(batch)
            own |= {f"throughput_{stage}_ms": statistics.median(lap[stage]) / batch for stage in STAGES}
    return times


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
