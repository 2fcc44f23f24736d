"""Wan, text to video: flow matching on latents of a causal video autoencoder, told UMT5's states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace
from stepdistill.families.latent import ByChannel, LatentConfig
from stepdistill.families.reading import T5_TOKENIZERS

# What the pipeline draws by default, in pixels and frames.
DEFAULT_SIZE, DEFAULT_FRAMES = (480, 832), 81
# Frames of a video that a preview shows.
SHOWN = 3


class WanTransformer(TransformerFace):
    """x_t: (B, C, F, h, w); cond: (B, L, 4096) of UMT5, zeros behind the prompt's end. There is no mask."""

    stacks: ClassVar = {"blocks": "whole"}
    prunable: ClassVar = {"blocks": "num_layers"}

    @property
    def patch(self) -> int:
        return self.transformer.config.patch_size[-1]

    def tokens(self, x_t: Tensor) -> int:
        return x_t[0, 0].numel() // math.prod(self.transformer.config.patch_size)

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        model = self.transformer
        return model(
            hidden_states=x_t.to(model.dtype),
            timestep=1000 * t.to(x_t.device, torch.float32),
            encoder_hidden_states=cond.to(model.dtype),
            return_dict=False,
        )[0]


class Wan(ByChannel):
    """WanPipeline, of one transformer. x0 is a video (C, F, h, w) of F latent frames, each of which but the first stands
    for `temporal` frames. Its image, for previews, metrics and rewards, is the middle frame; `frames` gives them all.
    """

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            frames: of a video: 1 or 1 more than a multiple of 4; 1 is an image.
            max_tokens: of UMT5.
        """

        frames: int = DEFAULT_FRAMES
        max_tokens: int = 512

    name = "wan"
    pipelines = ("WanPipeline",)
    face = WanTransformer
    default_guidance = 5.0
    passes_sigmas = False
    takes_sigmas = False
    sides = 16
    output = "frames"
    kept = ("frames", "max_tokens")
    optional = ("transformer_2",)
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKLWan",),
        "text_encoder": ("transformers.UMT5EncoderModel",),
        "tokenizer": T5_TOKENIZERS,
        "transformer": ("diffusers.WanTransformer3DModel",),
        "transformer_2": ("diffusers.WanTransformer3DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    # -------------------------------------------------------------------------------------------------------- sizes

    def check_model(self, model: nn.Module) -> None:
        if self.pipeline.transformer_2 is not None:
            raise UserError(
                f"{self.path} has two transformers, each for a part of the noise levels; the family {self.name!r}"
                " distils pipelines of one, such as Wan 2.1 and Wan 2.2 TI2V."
            )
        frames = self.config.frames
        if frames < 1 or (frames - 1) % self.temporal:
            raise UserError(
                f"family.frames={frames}: a video has 1 frame or 1 more than a multiple of {self.temporal};"
                f" the nearest is {1 + max(0, round((frames - 1) / self.temporal)) * self.temporal}."
            )

    @property
    def temporal(self) -> int:
        """Frames per latent frame but the first."""
        return self.pipeline.vae_scale_factor_temporal

    @property
    def stride(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    @property
    def multiple(self) -> int:
        return self.stride * getattr(self.pipeline, self.face.inner).config.patch_size[-1]

    def default_side(self, model: nn.Module) -> tuple[int, int]:
        height, width = DEFAULT_SIZE
        return height // self.stride, width // self.stride

    def latent_shape(self, model: nn.Module, height: int, width: int) -> tuple[int, ...]:
        frames = (self.config.frames - 1) // self.temporal + 1
        return (model.config.in_channels, frames, height // self.stride, width // self.stride)

    # ------------------------------------------------------------------------------------------ conditions and videos

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """(N, max_tokens, width) states."""
        states, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.config.max_tokens,
            device=self.device,
        )  # fmt: skip
        return states

    def stills(self, images: Tensor) -> Tensor:
        """Videos in which nothing moves, (N, F, 3, H, W)."""
        return images[:, None].expand(-1, self.config.frames, -1, -1, -1)

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (N, F, 3, H, W) of all frames, or (N, 3, H, W) where a video is one image, -> x0 (N, *shape).

        Raises:
            UserError: single images, where videos are wanted.
        """
        if images.ndim == 4 and self.config.frames == 1:
            images = images[:, None]
        if images.ndim != 5 or images.shape[1] != self.config.frames:
            given = images.shape[1] if images.ndim == 5 else 1
            raise UserError(
                f"family.frames={self.config.frames}: the data have {given} frame{'s' * (given != 1)} an example;"
                " set family.frames to that, or choose a method that learns from captions alone."
            )
        return super().encode_images(images.transpose(1, 2))

    def frames(self, x0: Tensor) -> Tensor:
        """x0 (N, *shape) -> videos in about [0, 1] (N, F, 3, H, W); differentiable."""
        return super().decode(x0).transpose(1, 2)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (N, *shape) -> the middle frames in about [0, 1] (N, 3, H, W); differentiable. Frames depend on earlier
        latents alone, so later ones are not decoded.
        """
        middle = self.config.frames // 2
        last = -(-middle // self.temporal)
        return self.frames(x0[:, :, : last + 1])[:, middle]

    def picture(self, x0: Tensor) -> np.ndarray:
        """First, middle and last frame of each video side by side, uint8 (H, W, 3)."""
        with torch.no_grad():
            frames = self.frames(x0).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        count = min(SHOWN, frames.shape[1])
        chosen = [i * (frames.shape[1] - 1) // max(count - 1, 1) for i in range(count)]
        return torch.cat(list(frames[:, chosen].flatten(0, 1)), 2).permute(1, 2, 0).numpy()

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told = {"num_frames": self.config.frames, "max_sequence_length": self.config.max_tokens}
        return super().stock_call(guidance_scale) | told
