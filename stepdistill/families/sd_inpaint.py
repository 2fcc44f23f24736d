"""Stable Diffusion's inpainting UNets (1.x, 2.x): beside x_t they see a mask and the image without what the mask covers.

A student is trained on masks drawn at random over the data's images, boxes and strokes, and some that cover everything
(as LaMa's, Suvorov et al. 2022, arXiv 2109.07161, have both kinds). Where only a prompt is given, the mask covers everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.families.base import Family
from stepdistill.families.faces import UNetFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.sd import SD
from stepdistill.families.unets import check_unet, inpainting_channels
from stepdistill.noise import SampleNoise

# Shares of the masks that cover everything, and that are boxes; the others are strokes.
EVERYTHING, BOXES = 0.1, 0.45
# Corners of a stroke.
CORNERS = 5


class InpaintFace(UNetFace):
    """cond: prompt (B, tokens, width), mask (B, 1, h, w), 1 where the image is to be made up, and masked (B, C, h, w), the
    latents of the image that is grey there.
    """

    def arguments(self, cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
        return {"encoder_hidden_states": cond["prompt"].to(dtype)}

    def sample(self, x_t: Tensor, cond: Cond) -> Tensor:
        return torch.cat((x_t, cond["mask"].to(x_t), cond["masked"].to(x_t)), 1)


class SDInpaint(SD):
    """StableDiffusionInpaintPipeline, from noise alone (its `strength` 1)."""

    name = "sd_inpaint"
    pipelines = ("StableDiffusionInpaintPipeline",)
    image_to_image = ""
    face = InpaintFace
    needs_images = True

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`: there is no such network of random weights."""

        unet: ClassVar[dict] = {}

    def set_pipeline(self, pipeline: Any) -> None:
        channels = pipeline.vae.config.latent_channels
        check_unet(pipeline.unet, self.path, [inpainting_channels(channels)], {}, channels)
        self._everything: dict[str, Tensor] = {}
        Latent.set_pipeline(self, pipeline)

    def fresh(self) -> Denoiser:
        return Family.fresh(self)

    def latent_shape(self, model: nn.Module, height: int, width: int) -> tuple[int, ...]:
        return (self.vae.config.latent_channels, height // self.stride, width // self.stride)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> SDInpaint:
        self._everything = {}
        return super().to(device, dtype)

    # ------------------------------------------------------------------------------------------------- conditions

    def encode(self, prompts: Sequence[str]) -> Cond:
        """With a mask that covers everything."""
        states = super().encode(prompts)
        if not self._everything:
            grey = torch.full((1, 3, *self.resolution), 127, dtype=torch.uint8)
            self._everything = self.hidden(grey, torch.ones(1, 1, *self.resolution))
        whole = {
            name: c.expand(len(states), *c.shape[1:]).to(states.device)
            for name, c in self._everything.items()
        }
        return {"prompt": states} | whole

    def hidden(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """images: uint8 (N, 3, H, W); masks: (N, 1, H, W), 1 where they are to be made up -> `mask` and `masked` of
        conditions.
        """
        masks = (masks.to(self.vae.device) >= 0.5).float()
        pixels = images.to(self.vae.device, torch.float32) / 127.5 - 1
        with torch.no_grad():
            encoded = self.vae.encode((pixels * (1 - masks)).to(self.vae.dtype))
            masked = self.normalised(self.latents_of(encoded).float())
        return {"mask": nnf.interpolate(masks, size=masked.shape[2:]), "masked": masked}

    def completed(self, cond: Cond, uncond: Cond, images: Tensor, noise: SampleNoise) -> tuple[Cond, Cond]:
        """A mask for each image, the same with the prompt and without."""
        masks = random_masks(noise, *images.shape[2:])
        told = {name: c.to(cond["prompt"].device) for name, c in self.hidden(images, masks).items()}
        return cond | told, uncond | told

    # -------------------------------------------------------------------------------------------- the stock pipeline

    def assembled(self, model: nn.Module, scheduler: Any, **settings: Any) -> Any:
        return Latent.assembled(self, model, scheduler, **settings)

    def stock_inputs(self) -> dict[str, str]:
        height, width = self.resolution
        return {
            "image": f'Image.new("RGB", ({width}, {height}), "gray")',
            "mask_image": f'Image.new("L", ({width}, {height}), 255)',
        }


def random_masks(noise: SampleNoise, height: int, width: int) -> Tensor:
    """(B, 1, H, W) of 0 and 1, each a function of its sample alone: a box, a stroke, or everything."""
    kind, box = noise.rand(), noise.rand(4)
    corners, thickness = noise.rand(CORNERS, 2), noise.rand()
    device = kind.device
    # Pixel centres, in sides.
    y = ((torch.arange(height, device=device) + 0.5) / height)[:, None]
    x = ((torch.arange(width, device=device) + 0.5) / width)[None]
    sides = 0.2 + 0.7 * box[:, 2:]
    first = box[:, :2] * (1 - sides)

    def within(at: Tensor, axis: int) -> Tensor:
        low, side = (each[:, axis, None, None] for each in (first, sides))
        return (at >= low) & (at <= low + side)

    boxes = within(y, 0) & within(x, 1)
    strokes = _distance(corners, y, x) <= (0.03 + 0.12 * thickness)[:, None, None]
    kind = kind[:, None, None]
    masks = torch.where(kind < EVERYTHING, True, torch.where(kind < EVERYTHING + BOXES, boxes, strokes))
    return masks[:, None].float()


def _distance(corners: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(B, H, W) from each pixel to the line through `corners` (B, K, 2) one after another, in (y, x)."""
    nearest = None
    for start, end in zip(corners[:, :-1].unbind(1), corners[:, 1:].unbind(1), strict=True):
        (ay, ax), (by, bx) = (each[:, :, None, None].unbind(1) for each in (start, end - start))
        # Where along the segment the pixel is nearest to it.
        along = (((y - ay) * by + (x - ax) * bx) / (by**2 + bx**2).clamp_min(1e-12)).clamp(0, 1)
        distance = torch.hypot(y - ay - along * by, x - ax - along * bx)
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
    return nearest
