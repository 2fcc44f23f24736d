"""Frozen networks that `add` looks at images through. Adding one is one class and one line in EYES.

One's own derives from `Eye` and is written my_package.my_file:MyEye; training runs it with --allow-code. The class
is made once, with the recipe's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.clip import Clip
from stepdistill.registry import Table

EYES = Table(
    "stepdistill.eyes:Eye",
    {"clip": "stepdistill.eyes:ClipEye", "fourier": "stepdistill.eyes:FourierEye"},
)


class Eye:
    """What all eyes derive from.

    Attributes:
        widths: channels of each layer's features.
        prompt_width: of a prompt's embedding, 0 where the eye has none.
        reads_captions: prompts must be texts, no classes.
    """

    reads_captions: ClassVar[bool] = False
    widths: tuple[int, ...]
    prompt_width: int = 0

    def features(self, images: Tensor) -> list[Tensor]:
        """What the family decodes, images (B, 3, H, W) in about [0, 1], -> (B, places, C) per layer, with gradient."""
        raise NotImplementedError

    def prompts(self, prompts: Sequence, device: torch.device) -> Tensor:
        """Embeddings (B, prompt_width)."""
        raise NotImplementedError


class ClipEye(Eye):
    """Hidden states of a CLIP image tower after `layers` (counted from 1), and its caption embeddings."""

    reads_captions = True

    def __init__(self, directory: str = "", layers: Sequence[int] = ()):
        self.clip = Clip(directory)
        self.layers = tuple(layers) or tuple(range(1, self.clip.layers + 1))
        self.widths, self.prompt_width = (self.clip.width,) * len(self.layers), self.clip.dim

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [0, 1] -> (B, places, C) per layer, with gradient."""
        return self.clip.to(images.device).hidden_states(images, self.layers)

    def prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """(B, prompt_width)."""
        return self.clip.to(device).embed_texts(prompts)


class FourierEye(Eye):
    """Fixed random Fourier features of points: what a frozen image network is to images (`add`).

    Two layers of `width` cosines, of frequencies up to a coarse and a fine `scale`.
    """

    def __init__(self, width: int = 128, scales: Sequence[float] = (1.0, 6.0), dims: int = 2):
        generator = torch.Generator().manual_seed(0)
        self.widths = (width,) * len(scales)
        self.frequencies = [scale * torch.randn(dims, width, generator=generator) for scale in scales]
        self.phases = 2 * math.pi * torch.rand(width, generator=generator)

    def features(self, points: Tensor) -> list[Tensor]:
        """(B, dims) -> (B, 1, width) per layer."""
        waves = [(points @ each.to(points) + self.phases.to(points)).cos() for each in self.frequencies]
        return [math.sqrt(2) * each[:, None] for each in waves]
