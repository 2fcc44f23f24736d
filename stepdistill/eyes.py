"""Frozen networks that `add` and `rdm` look at images through. Adding one is one class and one line in EYES.

One's own derives from `Eye` and is written my_package.my_file:MyEye; training runs it with --allow-code. The class
is made once, with the recipe's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from stepdistill.clip import Clip, normalisation, pretrained
from stepdistill.errors import UserError
from stepdistill.registry import Table
from stepdistill.untrusted import check_directory

EYES = Table(
    "stepdistill.eyes:Eye",
    {
        "clip": "stepdistill.eyes:ClipEye",
        "dino": "stepdistill.eyes:DinoEye",
        "fourier": "stepdistill.eyes:FourierEye",
    },
)


class Eye:
    """What all eyes derive from.

    Attributes:
        widths: channels of each layer's features.
        prompt_width: of a prompt's embedding, 0 where the eye has none.
        reads_captions: prompts must be texts, no classes.
        directory: where its weights lie, "" = nowhere.
    """

    reads_captions: ClassVar[bool] = False
    directory: str = ""
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
        self.directory = self.clip.directory
        self.layers = tuple(layers) or tuple(range(1, self.clip.layers + 1))
        self.widths, self.prompt_width = (self.clip.width,) * len(self.layers), self.clip.dim

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [0, 1] -> (B, places, C) per layer, with gradient. Raises UserError for what are none."""
        _refuse_points(images, "clip")
        return self.clip.to(images.device).hidden_states(images, self.layers)

    def prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """(B, prompt_width)."""
        return self.clip.to(device).embed_texts(prompts)


class DinoEye(Eye):
    """Hidden states of a DINOv2 after `layers` (counted from 1), ADD's own eye (arXiv 2311.17042, Sec. 3.2: ViT-S); it is
    told no captions. directory: of a transformers Dinov2Model with its preprocessor_config.json. side: what images are
    resized to, a multiple of the patches' side. layers: four, evenly, unless they are named.

    Raises:
        UserError: no such model, or no such layers or side of it.
    """

    def __init__(self, directory: str, layers: Sequence[int] = (), side: int = 224):
        path = Path(directory)
        if not path.is_dir():
            raise UserError(
                f"method.arguments.directory: there is no directory {directory} of a DINOv2 model."
            )
        check_directory(path)
        self.directory = directory
        self.mean, self.std = normalisation(path)
        self.model = pretrained("Dinov2Model", path, use_safetensors=True)
        config = self.model.config
        depth, patch = config.num_hidden_layers, config.patch_size
        self.layers = tuple(layers) or tuple(sorted({math.ceil(depth * k / 4) for k in (1, 2, 3, 4)}))
        if not all(1 <= layer <= depth for layer in self.layers):
            raise UserError(f"method.arguments.layers must be from 1 to {depth}, got {list(layers)}.")
        if side < patch or side % patch:
            raise UserError(f"method.arguments.side must be a multiple of {patch}, got {side}.")
        self.side, self.widths = side, (config.hidden_size,) * len(self.layers)

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [0, 1] -> (B, 1 + patches, C) per layer, with gradient. Raises UserError for what are none."""
        _refuse_points(images, "dino")
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
            self.model.to(images.device)
        # Decoders may give half precision, in which CPUs cannot resize.
        images = images.float()
        if images.shape[-2:] != (self.side, self.side):
            images = nnf.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        seen = self.model(pixel_values=(images - self.mean) / self.std, output_hidden_states=True)
        return [seen.hidden_states[i] for i in self.layers]


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
        """(B, dims) -> (B, 1, width) per layer. Raises UserError for images, and points of other dimensions."""
        dims = self.frequencies[0].shape[0]
        if points.shape[1:] != (dims,):
            raise UserError(
                f"the eye fourier looks at points of {dims} numbers, and this family makes {tuple(points.shape[1:])}; give"
                " its arguments dims, or for images choose clip or dino."
            )
        waves = [(points @ each.to(points) + self.phases.to(points)).cos() for each in self.frequencies]
        return [math.sqrt(2) * each[:, None] for each in waves]


def _refuse_points(images: Tensor, name: str) -> None:
    if images.ndim != 4:
        raise UserError(
            f"the eye {name} looks at images (3, H, W), and this family makes {tuple(images.shape[1:])}; for points choose"
            " fourier."
        )
