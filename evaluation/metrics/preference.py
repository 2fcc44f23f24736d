"""Scores of what people prefer, by CLIP models that were trained on their choices: 100 times the cosine, as published.

Both are stock CLIPModels of transformers. They read the caption alone and see the sample as it was drawn: a protocol's
prefix and resize are for the CLIP score.
"""

from __future__ import annotations

from typing import ClassVar

from evaluation.images import Images
from evaluation.metrics.base import Inputs
from evaluation.metrics.clip_score import ClipScore
from evaluation.values import Value


class PickScore(ClipScore):
    """`pickscore:pickscore-v1`, higher is better (Kirstain et al. 2023, arXiv 2305.01569)."""

    values = (Value("pickscore", better="higher", main=True),)
    weights: ClassVar[dict[str, str]] = {"pickscore-v1": "pickscore-v1"}

    def __init__(self, device: str = "cpu", dtype: str = "float32") -> None:
        super().__init__(None, next(iter(self.weights)), device, dtype)

    def seen(self, inputs: Inputs) -> tuple[Images, list[str]]:
        return inputs.drawn or inputs.images, list(inputs.captions)


class HPSv2(PickScore):
    """`hpsv2:hpsv2-hf`, higher is better (Wu et al. 2023, arXiv 2306.09341)."""

    values = (Value("hpsv2", better="higher", main=True),)
    weights: ClassVar[dict[str, str]] = {"hpsv2-hf": "hpsv2-hf"}
