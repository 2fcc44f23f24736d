"""CLIP score: 100 times the mean cosine of image and caption (Hessel et al. 2021, arXiv 2104.08718)."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extractors import padded
from evaluation.images import rechunked
from evaluation.metrics.base import Inputs
from stepdistill import assets
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

_CHUNK = 50


@dataclass(frozen=True)
class _Clip:
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    mean: Tensor  # (3, 1, 1), of pixels in 0 .. 1
    std: Tensor


class ClipScore:
    """`clip:<model>`, higher is better. Scores of two models don't compare, so the name says which it was.

    `directory`: a CLIPModel with its tokenizer and preprocessor_config.json; None is the embedded one.
    """

    needs = frozenset({"images", "captions"})

    def __init__(self, directory: str | os.PathLike[str] | None = None, name: str | None = None) -> None:
        self.directory = Path(directory) if directory else None
        self.name = name or (self.directory.name if self.directory else "scenes-v1")

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """The score and its standard error over images."""
        cosines = self.cosines(inputs.images, inputs.captions).double()
        error = float(cosines.std() / len(cosines) ** 0.5) if len(cosines) > 1 else float("nan")
        return {f"clip:{self.name}": 100 * float(cosines.mean()), f"clip:{self.name}/se": 100 * error}

    @torch.no_grad()
    def cosines(self, images: Iterable[Tensor], captions: Sequence[str]) -> Tensor:
        """Cosine (N,) of each image with its caption.

        images: uint8 batches (n, 3, H, W). Raises UserError when images and captions differ in number.
        """
        clip = self._clip

        def pictured(chunk: Tensor) -> Tensor:
            side = clip.model.config.vision_config.image_size
            pixels = _pixels(chunk, clip.mean, clip.std, side)
            return _embedding(clip.model.get_image_features(pixel_values=pixels))

        pictures = [padded(pictured, chunk, _CHUNK) for chunk in rechunked(images, _CHUNK)]
        count = sum(map(len, pictures))
        if count != len(captions) or not count:
            raise UserError(
                f"a CLIP score needs a caption per image, got {count} images and {len(captions)} captions."
            )
        spoken = [
            padded(lambda ids: _embedding(clip.model.get_text_features(input_ids=ids)), ids, _CHUNK)
            for ids in self._tokens(captions).split(_CHUNK)
        ]
        return F.cosine_similarity(torch.cat(pictures), torch.cat(spoken), dim=1)

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        # The text tower is causal and pools at the end token, so what follows it needs no mask.
        tokenizer, positions = (
            self._clip.tokenizer,
            self._clip.model.config.text_config.max_position_embeddings,
        )
        length = min(tokenizer.model_max_length, positions)
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokenizer(list(captions), **options).input_ids

    @functools.cached_property
    def _clip(self) -> _Clip:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils import logging

        path = self.directory or assets.path("clip")
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            processor = json.loads((path / "preprocessor_config.json").read_text())
            mean, std = (torch.tensor(processor[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
            options = {"local_files_only": True}
            model = CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the CLIP model in {path} cannot be loaded ({reason}).") from None
        finally:
            if shown:
                logging.enable_progress_bar()
        return _Clip(model.eval().requires_grad_(False), tokenizer, mean, std)


def _pixels(images: Tensor, mean: Tensor, std: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) for CLIP: short side to `side` by antialiased bicubic, centre crop, normalised."""
    pixels = images.float() / 255
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[..., top : top + side, left : left + side]
    return (pixels - mean) / std


def _embedding(output) -> Tensor:
    """Transformers 4 returns the projected embedding, 5 an object that has it as `pooler_output`."""
    return output if isinstance(output, Tensor) else output.pooler_output
