"""Images and sources of examples that tests of the data share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stepdistill.config import build
from stepdistill.registry import resolve
from training.data import DATA, Source


def source(name: str, **config: Any) -> Source:
    """As a recipe's data section makes it."""
    cls = resolve(name, DATA, "data")
    return cls(
        build(cls.Config, {key: str(v) if isinstance(v, Path) else v for key, v in config.items()}, "data")
    )


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def noise(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
