"""CLIP score: 100 times the mean cosine of image and caption (Hessel et al. 2021, arXiv 2104.08718).

Published scores differ in the model, in a prefix before the caption ("A photo depicts " with the LAION model),
in the factor (1, 100, or 2.5 with negatives cut off) and so in what they compare with. Here the factor is 100,
nothing is cut off, and a score's name is its model's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.clip import Clip
from evaluation.extractors import padded
from evaluation.images import Images, rechunked
from evaluation.metrics.base import Inputs, Metric
from evaluation.processes import BFLOAT16, in_bfloat16, ready_device
from evaluation.settings import Place
from evaluation.values import Value, measured
from evaluation.weights import find
from stepdistill import assets
from stepdistill.errors import UserError

# Names of scores and the weights they need.
VARIANTS = {
    "vit-b-32": "clip-vit-b32",
    "vit-b-16": "clip-vit-b16",
    "vit-l-14": "clip-vit-l14",
    "vit-g-14-laion2b": "clip-vit-g14-laion2b",
}
_CHUNK = 50


class ClipScore(Metric):
    """`clip:<model>`, higher is better. Scores of two models don't compare, so the name says which it was.

    `directory`: a CLIPModel with its tokenizer and preprocessor_config.json; None is the one called `name`:
    one of VARIANTS, whose weights are searched for, and the embedded one for None. dtype: "bfloat16" becomes part of
    the name, and what it changed is said.
    """

    needs = frozenset({"images", "captions"})
    values = (Value("clip", better="higher", main=True),)
    weights: ClassVar[dict[str, str]] = VARIANTS

    def __init__(
        self, directory: Place | None = None, name: str | None = None, device: str = "cpu",
        dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.device, self.half = ready_device(device), dtype == "bfloat16"
        self.directory, self.wanted = Path(directory) if directory else None, self.weights.get(name or "")
        self.name = name or (self.directory.name if self.directory else "scenes-v1")
        self.name += BFLOAT16 * self.half

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError when the model cannot be loaded."""
        _ = self._clip.tokenizer

    @property
    def sha256(self) -> str:
        """Of the model's files."""
        return self._clip.sha256

    def compute(self, inputs: Inputs) -> list[Value]:
        """The score and its standard error over images."""
        images, captions = self.seen(inputs)
        inputs.doubts += self.doubts(captions)
        cosines = self.cosines(images, captions, inputs.doubts).double()
        error = float(cosines.std() / len(cosines) ** 0.5) if len(cosines) > 1 else float("nan")
        numbers = {self.values[0].name: (100 * float(cosines.mean()), 100 * error)}
        return measured(self.values, numbers, self.name)

    def seen(self, inputs: Inputs) -> tuple[Images, list[str]]:
        """The images and captions that are compared."""
        captions = [inputs.clip_prefix + caption for caption in inputs.captions]
        return inputs.clip_images or inputs.images, captions

    @torch.no_grad()
    def cosines(
        self, images: Iterable[Tensor], captions: Sequence[str], doubts: list[str] | None = None
    ) -> Tensor:
        """Cosine (N,) of each image with its caption; `doubts` gets what half precision changed.

        images: uint8 batches (n, 3, H, W). Raises UserError when images and captions differ in number.
        """
        clip = self._clip

        def compared(chunk: Tensor, ids: Tensor) -> Tensor:
            sides = padded(clip.of_images, chunk, _CHUNK), padded(clip.of_tokens, ids, _CHUNK)
            return F.cosine_similarity(*sides, dim=1).cpu()

        if self.half:
            compared = in_bfloat16(compared, self.device, self.name, [] if doubts is None else doubts)
        parts, count = [], 0
        for chunk in rechunked(images, _CHUNK):
            own = captions[count : count + len(chunk)]
            count += len(chunk)
            if len(own) == len(chunk):
                parts.append(compared(chunk, clip.tokens(own)))
        if count != len(captions) or not count:
            raise UserError(
                f"a CLIP score needs a caption per image, got {count} images and {len(captions)} captions."
            )
        return torch.cat(parts)

    def doubts(self, captions: Sequence[str]) -> list[str]:
        """What a reader of the score has to know of how the model reads these captions."""
        words, doubts = self._clip.tokenizer, []
        tokens = words(list(captions), verbose=False).input_ids
        if long := sum(len(ids) > self._clip.length for ids in tokens):
            doubts.append(
                f"{long} of {len(tokens)} captions have more than the {self._clip.length} tokens that {self.name} reads "
                "and were cut."
            )
        unknown = words.unk_token_id
        strange = [index for index, ids in enumerate(tokens, 1) if unknown in ids[1:-1]]
        if strange and unknown not in (words.pad_token_id, words.eos_token_id):
            doubts.append(
                f"{len(strange)} of {len(tokens)} captions have words that {self.name} does not know, like caption "
                f"{strange[0]}: its score says nothing of them; name a CLIP model with --clip."
            )
        return doubts

    @functools.cached_property
    def _clip(self) -> Clip:
        there = self.directory or (find(self.wanted) if self.wanted else assets.path("clip"))
        return Clip(there, self.device)
