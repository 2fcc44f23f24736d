"""CLIP as metrics see it: embeddings of uint8 images and of captions, as the published code makes them.

`stepdistill.clip` is the same network for a loss, differentiable in images that are floats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.weights import model_files
from stepdistill.clip import normalisation, pretrained, tokenizer
from stepdistill.provenance import sha256_of_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Clip:
    """A CLIPModel from a directory with its tokenizer and preprocessor_config.json. Raises UserError for another."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self.mean, self.std = normalisation(path)
        self.model = pretrained("CLIPModel", path).to(device)
        self.side: int = self.model.config.vision_config.image_size

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer(self.path)

    @property
    def sha256(self) -> str:
        """Of the model's files."""
        return sha256_of_files([self.path / "config.json", *model_files(self.path)])

    @property
    def length(self) -> int:
        """Tokens of a caption that the model reads."""
        return min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(N, length). The text tower is causal and pools at the end token, so what follows it needs no mask."""
        return self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        """(N, dim), not normalised, of uint8 (N, 3, H, W)."""
        pixels = clip_pixels(images, self.side, self.mean, self.std)
        return self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output

    @torch.no_grad()
    def of_tokens(self, ids: Tensor) -> Tensor:
        """(N, dim), not normalised, of (N, length)."""
        return self.model.get_text_features(input_ids=ids.to(self.device)).pooler_output


def clip_pixels(images: Tensor, side: int, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) as CLIP was trained to see them: (N, 3, side, side), normalised.

    Pillow's bicubic in uint8 brings the short side to `side`, a centre crop follows. mean, std: (3, 1, 1), of pixels
    in 0 .. 1. transformers' processor resizes in its Pillow form, whose pixels are the published ones; its form on
    torchvision differs in two thirds of them, and both crop an odd margin a pixel off OpenAI's.
    """
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        do_center_crop=False,
        image_mean=mean.flatten().tolist(),
        image_std=std.flatten().tolist(),
    )
    pixels = processor(
        list(images.cpu()), input_data_format="channels_first", return_tensors="pt"
    ).pixel_values
    top, left = (round((size - side) / 2) for size in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]
