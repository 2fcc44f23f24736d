"""What comes back: the images of a request, how long they took, and the settings that make them again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.png import write_png
from app.request import Request
from app.settings import settings


@dataclass(frozen=True)
class Shot:
    """One model's image, uint8 (H, W, 3), and the seconds of its text, denoise and decode stages."""

    model: str
    name: str
    image: np.ndarray
    steps: int
    guidance_scale: float
    text: float
    denoise: float
    decode: float

    @property
    def total(self) -> float:
        """Seconds of all three stages."""
        return self.text + self.denoise + self.decode

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by stage, and of all three as "total"."""
        return {"text": self.text, "denoise": self.denoise, "decode": self.decode, "total": self.total}


@dataclass(frozen=True)
class Result:
    """The shots of a request, by model name, and the request as it was run (with the seed that was used).

    `queued` is the seconds the request waited for the worker, `about` what the PNG says of the engine.
    """

    request: Request
    shots: dict[str, Shot]
    queued: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """How many times faster the student was than the teacher, or None when only one ran."""
        if not {"student", "teacher"} <= self.shots.keys():
            return None
        return self.shots["teacher"].total / max(self.shots["student"].total, 1e-9)

    def png(self, model: str) -> bytes:
        """The image of `model` as a PNG file that carries the settings that made it."""
        return write_png(self.shots[model].image, self.settings(model))

    def settings(self, model: str) -> dict[str, Any]:
        """What is needed to make the image of `model` again."""
        shot = self.shots[model]
        request = replace(self.request, model=model, steps=shot.steps, guidance_scale=shot.guidance_scale)
        return {
            **settings(request),
            "made_by": shot.name,
            "seconds": {name: round(value, 4) for name, value in shot.timings.items()},
            "about": {
                key: value for key, value in self.about.items() if isinstance(value, (str, int, float))
            },
        }
