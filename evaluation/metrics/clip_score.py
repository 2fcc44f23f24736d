"""CLIP score: 100 times the mean cosine of image and caption (Hessel et al. 2021, arXiv 2104.08718).

Published scores differ in the model, in a prefix before the caption ("A photo depicts " with the LAION model),
in the factor (1, 100, or 2.5 with negatives cut off) and so in what they compare with. Here the factor is 100,
nothing is cut off, and a score's name is its model's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extractors import clip_pixels, embedding, padded
from evaluation.images import rechunked
from evaluation.metrics.base import Inputs, Metric
from evaluation.processes import ready_device
from evaluation.values import Value, measured
from evaluation.weights import find, model_files
from stepdistill import assets
from stepdistill.clip import normalisation, pretrained, tokenizer
from stepdistill.errors import UserError
from stepdistill.provenance import sha256_of_files

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

# Names of scores and the weights they need. A prefix is part of the captions, so the protocol has it.
VARIANTS = {
    "vit-b-32": "clip-vit-b32",
    "vit-b-16": "clip-vit-b16",
    "vit-l-14": "clip-vit-l14",
    "vit-g-14-laion2b": "clip-vit-g14-laion2b",
}
_CHUNK = 50


@dataclass(frozen=True)
class _Clip:
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    # (3, 1, 1), of pixels in 0 .. 1.
    mean: Tensor
    std: Tensor


class ClipScore(Metric):
    """`clip:<model>`, higher is better. Scores of two models don't compare, so the name says which it was.

    `directory`: a CLIPModel with its tokenizer and preprocessor_config.json; None is the one called `name`:
    one of VARIANTS, whose weights are searched for, and the embedded one for None.
    """

    needs = frozenset({"images", "captions"})
    values = (Value("clip", better="higher", main=True),)

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, name: str | None = None, device: str = "cpu"
    ) -> None:
        self.device = ready_device(device)
        self.directory = Path(directory) if directory else None
        self.name = name or (self.directory.name if self.directory else "scenes-v1")
        if self.directory is None and name in VARIANTS:
            self.directory = find(VARIANTS[name])

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError when the model cannot be loaded."""
        _ = self._clip

    @property
    def sha256(self) -> str:
        """Of the model's files."""
        path = self.directory or assets.path("clip")
        return sha256_of_files([path / "config.json", *model_files(path)])

    def compute(self, inputs: Inputs) -> list[Value]:
        """The score and its standard error over images."""
        inputs.doubts += self.doubts(inputs.captions)
        cosines = self.cosines(inputs.clip_images or inputs.images, inputs.captions).double()
        error = float(cosines.std() / len(cosines) ** 0.5) if len(cosines) > 1 else float("nan")
        return measured(self.values, {"clip": (100 * float(cosines.mean()), 100 * error)}, self.name)

    @torch.no_grad()
    def cosines(self, images: Iterable[Tensor], captions: Sequence[str]) -> Tensor:
        """Cosine (N,) of each image with its caption.

        images: uint8 batches (n, 3, H, W). Raises UserError when images and captions differ in number.
        """
        clip = self._clip

        def pictured(chunk: Tensor) -> Tensor:
            side = clip.model.config.vision_config.image_size
            pixels = clip_pixels(chunk, side, clip.mean, clip.std)
            return embedding(clip.model.get_image_features(pixel_values=pixels.to(self.device)))

        def spoken(ids: Tensor) -> Tensor:
            return embedding(clip.model.get_text_features(input_ids=ids.to(self.device)))

        found, count = [], 0
        for chunk in rechunked(images, _CHUNK):
            own = captions[count : count + len(chunk)]
            count += len(chunk)
            if len(own) == len(chunk):
                sides = padded(pictured, chunk, _CHUNK), padded(spoken, self._tokens(own), _CHUNK)
                found.append(F.cosine_similarity(*sides, dim=1).cpu())
        if count != len(captions) or not count:
            raise UserError(
                f"a CLIP score needs a caption per image, got {count} images and {len(captions)} captions."
            )
        return torch.cat(found)

    def doubts(self, captions: Sequence[str]) -> list[str]:
        """What a reader of the score has to know of how the model reads these captions."""
        words, found = self._clip.tokenizer, []
        tokens = words(list(captions), verbose=False).input_ids
        if long := sum(len(ids) > self._length for ids in tokens):
            found.append(
                f"{long} of {len(tokens)} captions have more than the {self._length} tokens that {self.name} reads and "
                "were cut."
            )
        unknown = words.unk_token_id
        strange = next((i for i, ids in enumerate(tokens) if unknown in ids[1:-1]), None)
        if strange is not None and unknown not in (words.pad_token_id, words.eos_token_id):
            count = sum(unknown in ids[1:-1] for ids in tokens)
            found.append(
                f"{count} of {len(tokens)} captions have words that {self.name} does not know, like caption "
                f"{strange + 1}: its score says nothing of them; name a CLIP model with --clip."
            )
        return found

    @property
    def _length(self) -> int:
        """Tokens of a caption that the model reads."""
        clip = self._clip
        return min(clip.tokenizer.model_max_length, clip.model.config.text_config.max_position_embeddings)

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        # The text tower is causal and pools at the end token, so what follows it needs no mask.
        options = {
            "padding": "max_length",
            "truncation": True,
            "max_length": self._length,
            "return_tensors": "pt",
        }
        return self._clip.tokenizer(list(captions), **options).input_ids

    @functools.cached_property
    def _clip(self) -> _Clip:
        path = self.directory or assets.path("clip")
        mean, std = normalisation(path)
        return _Clip(pretrained("CLIPModel", path).to(self.device), tokenizer(path), mean, std)
