"""Stable Diffusion XL: two CLIP encoders, whose pooled text and the image's size and crop are told beside the states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.faces import UNetFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import CLIP_TOKENIZERS
from stepdistill.families.unets import check_unet, drop_variance


class SDXLUNet(UNetFace):
    """cond: prompt (B, 77, 2048), pooled (B, 1280) of the second encoder, time_ids (B, 6): original height and
    width, crop's top and left, target height and width, in pixels.
    """

    def arguments(self, cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
        # Sizes stay float32: half precision knows no 1023.
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["time_ids"].float()}
        return {"encoder_hidden_states": cond["prompt"].to(dtype), "added_cond_kwargs": added}


class SDXL(Latent):
    """StableDiffusionXLPipeline; without a prompt its condition is zeros where the pipeline says so, as SDXL's does."""

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            size_conditions: what networks are told of real images (Podell et al. 2023, arXiv 2307.01952, Sec. 2.2):
                "image" = the size and the crop of each, as SDXL was trained; "target" = an uncropped image of the size
                that is drawn, as a pipeline says by default.
        """

        size_conditions: Literal["image", "target"] = "image"

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    image_to_image = "StableDiffusionXLImg2ImgPipeline"
    face = SDXLUNet
    default_guidance = 5.0
    init_noises = ("unit", "sigma")
    unused: ClassVar = dict.fromkeys(("image_encoder", "feature_extractor"))
    text_parts = ("text_encoder", "text_encoder_2")
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"),
        "text_encoder": ("transformers.CLIPTextModel",),
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
        "tokenizer": CLIP_TOKENIZERS,
        "tokenizer_2": CLIP_TOKENIZERS,
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    def set_pipeline(self, pipeline: Any) -> None:
        told = {"addition_embed_type": "text_time"}
        check_unet(pipeline.unet, self.path, [pipeline.vae.config.latent_channels], told)
        config, pooled = pipeline.unet.config, pipeline.text_encoder_2.config.projection_dim
        # Six numbers of sizes beside the pooled text, of which a refiner takes five.
        if config.projection_class_embeddings_input_dim != 6 * config.addition_time_embed_dim + pooled:
            raise UserError(
                f"{self.path}: projection_class_embeddings_input_dim={config.projection_class_embeddings_input_dim} in"
                f" unet/config.json is not 6 x {config.addition_time_embed_dim} + {pooled}: this UNet is told other"
                " sizes than an image's own, as a refiner is; choose a base model."
            )
        drop_variance(pipeline)
        super().set_pipeline(pipeline)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt": states, "pooled": pooled, "time_ids": self._sizes(len(prompts))}

    def sized(self, cond: Cond, sizes: Tensor) -> Cond:
        """As its pipeline, which tells the empty prompt the sizes of the other."""
        if self.config.size_conditions == "target":
            # What a pipeline says that is asked for an image of that size.
            sizes = torch.cat((sizes[:, 4:], torch.zeros_like(sizes[:, 2:4]), sizes[:, 4:]), 1)
        return cond | {"time_ids": sizes.to(cond["time_ids"])}

    def uncond(self, count: int) -> Cond:
        empty = super().uncond(count)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        zeros = {name: torch.zeros_like(empty[name]) for name in ("prompt", "pooled")}
        return empty | zeros

    def normalised(self, z: Tensor) -> Tensor:
        statistics = self.channel_statistics(z)
        return super().normalised(z if statistics is None else (z - statistics[0]) / statistics[1])

    def denormalised(self, x0: Tensor) -> Tensor:
        z, statistics = super().denormalised(x0), self.channel_statistics(x0)
        return z if statistics is None else z * statistics[1] + statistics[0]

    def _sizes(self, count: int) -> Tensor:
        size = (*self.resolution, 0, 0, *self.resolution)
        return torch.tensor([size], dtype=torch.float32, device=self.device).repeat(count, 1)
