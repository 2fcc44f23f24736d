"""What `python -m evaluation run` is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.protocol import Protocol

# How people name a place.
Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Settings:
    """Each is an option of the command, whose --help says what it is and what None stands for."""

    pipelines: Sequence[Place]
    out: Place
    teacher: Place | None = None
    steps: Sequence[int] | None = None
    guidance: float | None = None
    teacher_steps: int | None = None
    teacher_guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0)
    n: int | None = None
    teacher_n: int | None = None
    metrics: Sequence[str] | None = None
    protocol: str | Protocol = "scenes-2k"
    reference: Place | None = None
    captions: Place | None = None
    captions_seed: int = -1
    seeds: Sequence[int] = (0,)
    extractor: Place | None = None
    clip: Place | None = None
    batch: int = 64
    io_batch: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    latency_images: int = 10
    throughput_batch: int = 16
    force: bool = False
