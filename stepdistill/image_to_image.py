"""Drawing from an image: how much of a model's walk is left when it begins in an image and not in noise.

As in diffusers' image-to-image pipelines (SDEdit, Meng et al. 2022, arXiv 2108.01073): the image is encoded, noised to
x_t = alpha_t x0 + sigma_t eps at the first time that is left, and the steps from there on are walked. `strength` in
(0, 1] says how much is left. At 1 nothing of the image is, and the walk is that from noise alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.drawing import Sampler


def left_of(times: Sequence[float], strength: float, up: bool = False) -> tuple[float, ...]:
    """The last N * strength of a many-step model's N times: none where that is less than one.

    Rounded down, as StableDiffusionImg2ImgPipeline has it; `up` as pipelines of flow models have it.
    """
    count = len(times)
    left = count - int(count - min(count * strength, count)) if up else min(int(count * strength), count)
    return tuple(times[count - left :])


def left_of_levels(levels: Sequence[float], steps: int, strength: float) -> tuple[float, ...]:
    """At most `steps` times, evenly of the last M * strength of the M levels a few-step student was trained at.

    As LCMScheduler has it, with its M `original_inference_steps`; where fewer levels are left than steps, each is
    called once. So a student of one step is called at the level that `strength` reaches.
    """
    left = left_of(levels, strength)
    steps = min(steps, len(left))
    return tuple(left[i * len(left) // steps] for i in range(steps))


def check_images(sampler: Sampler, images: Tensor | None, strength: float, count: int) -> None:
    """Raise UserError for images that a sampler cannot draw from, or that are not uint8 (count, 3, H, W) of its size."""
    if images is None:
        if strength != 1:
            raise UserError(f"strength={strength:g} says how far images are changed; give images as well.")
        return
    if why := no_images(sampler):
        raise UserError(f"{sampler.name!r} cannot draw from images: {why}; leave them out.")
    wanted = (count, 3, *sampler.resolution)
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or tuple(images.shape) != wanted:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"images must be a uint8 tensor of shape {wanted}, one for each prompt, got {got}.")


def no_images(sampler: Sampler) -> str:
    """Why a sampler cannot draw from images; "" where it can."""
    if sampler.image_to_image:
        return ""
    if not sampler.family_.image_to_image:
        return f"pipelines of the family {sampler.family!r} do not draw from images"
    return "it was trained at one noise level alone, where nothing of an image is left"
