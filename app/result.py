"""What comes back: an image, how long it took, and the settings that make it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.png import write_png
from app.request import Request
from app.settings import settings


@dataclass(frozen=True)
class Result:
    """The image of a request, uint8 (H, W, 3), and the request as it was run, with the seed that was used.

    Attributes:
        name: the model's own, beside its id in the request.
        seconds: of the stages "text", "denoise" and "decode"; those of a batch are shared evenly.
        queued: seconds that the request waited. batch: images that were drawn with it at once.
        about: what the PNG says of model and machine, plain values.
        preview: decoded by the tiny decoder; its file holds no settings, which would not give it again.
    """

    request: Request
    image: np.ndarray
    name: str
    seconds: dict[str, float]
    queued: float = 0.0
    batch: int = 1
    about: dict[str, Any] = field(default_factory=dict)
    preview: bool = False

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def png(self, embed: bool = True) -> bytes:
        """The image as a PNG file, with the settings that made it unless `embed` is off or it is a preview."""
        return write_png(self.image, self.settings() if embed and not self.preview else None)

    def settings(self) -> dict[str, Any]:
        """What is needed to make the image again, and how it was made."""
        seconds = {**self.seconds, "total": self.total, "queued": self.queued}
        return {
            **settings(self.request),
            "made_by": self.name,
            "size": "{1}x{0}".format(*self.image.shape[:2]),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "batch": self.batch,
            **({"preview": True} if self.preview else {}),
            "about": {
                key: value for key, value in self.about.items() if isinstance(value, (str, int, float))
            },
        }
