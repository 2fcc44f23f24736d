"""Reward models: callables that score images, with a gradient. Adding one is one class and one line in REWARDS.

    reward(images (B, 3, H, W) in about [0, 1], prompts: captions or class indices) -> (B,) scores, higher is better

One's own derives from `RewardModel` and is written my_package.my_file:MyReward; training runs it with --allow-code.
The class is made once, with the recipe's arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as nnf
from torch import Tensor

from stepdistill.clip import Clip
from stepdistill.errors import UserError
from stepdistill.registry import Table

REWARDS = Table("stepdistill.rewards:RewardModel", {"clip": "stepdistill.rewards:ClipReward"})


class RewardModel:
    """What all reward models derive from.

    Attributes:
        reads_captions: prompts must be texts, no classes.
        directory: where its weights lie, "" = nowhere.
    """

    reads_captions: ClassVar[bool] = False
    directory: str = ""

    def __call__(self, images: Tensor, prompts: Sequence) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in about [0, 1], differentiable in them; higher is better."""
        raise NotImplementedError


class ClipReward(RewardModel):
    """Cosine of image and caption, in [-1, 1], by the embedded micro-CLIP or the CLIP in `directory`."""

    reads_captions = True

    def __init__(self, directory: str = ""):
        self.clip = Clip(directory)
        self.directory = self.clip.directory

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = self.clip.to(images.device)
        return nnf.cosine_similarity(clip.embed_images(images), clip.embed_texts(prompts), dim=1)


def scores(reward: RewardModel, name: str, images: Tensor, prompts: Sequence | None) -> Tensor:
    """`reward` of a batch, (B,).

    Raises:
        UserError: it returned something else than one number per image, or nothing to learn from.
    """
    if prompts is None:
        raise UserError(f"method.reward={name} scores images with their prompts, and this run has none.")
    returned = reward(images, prompts)
    shape = tuple(getattr(returned, "shape", ())) if isinstance(returned, Tensor) else type(returned).__name__
    if shape != (len(images),):
        raise UserError(
            f"method.reward={name} must return one score per image, shape ({len(images)},), got {shape}."
        )
    if images.requires_grad and not returned.requires_grad:
        raise UserError(
            f"method.reward={name} returned scores without a gradient, so nothing can be learnt from them;"
            " leave out no_grad and detach."
        )
    return returned
