"""Stable Diffusion 3 and 3.5: flow matching in joint blocks of text and image, told two CLIPs and, where there is one,
T5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import CLIP_TOKENIZERS, T5_TOKENIZERS

T5 = ("text_encoder_3", "tokenizer_3")


class SD3Transformer(TransformerFace):
    """cond: prompt (B, 77 + L, 4096), the states of both CLIPs side by side, padded to T5's width, and T5's behind them;
    pooled (B, 2048) of both CLIPs. No mask: padding is part of the prompt.
    """

    stacks: ClassVar = {"transformer_blocks": "second"}
    prunable: ClassVar = {"transformer_blocks": "num_layers"}

    def fixed(self, stack: str) -> dict[int, str]:
        last = len(self.transformer.transformer_blocks) - 1
        return {last: "the last block leaves the text out, and no other can stand in its place"}

    def recounted(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Of 3.5, the blocks with a second attention go by their new places."""
        dual = self.transformer.config.dual_attention_layers
        places = tuple(new for new, old in enumerate(kept["transformer_blocks"]) if old in dual)
        return super().recounted(kept) | {"dual_attention_layers": places}

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        model = self.transformer
        return model(
            hidden_states=x_t.to(model.dtype),
            timestep=1000 * t.to(x_t.device, torch.float32),
            encoder_hidden_states=cond["prompt"].to(model.dtype),
            pooled_projections=cond["pooled"].to(model.dtype),
            return_dict=False,
        )[0]


class SD3(Latent):
    """StableDiffusion3Pipeline. Without T5, which is legal, its states are zeros."""

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: of T5; padding is part of the prompt, so a student is told as many as it was trained with.
            t5: whether T5 is loaded and told, where the pipeline has one. A student trained without leaves without.
        """

        max_tokens: int = 256
        t5: bool = True

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    image_to_image = "StableDiffusion3Img2ImgPipeline"
    face = SD3Transformer
    default_guidance = 7.0
    passes_sigmas = False
    kept = ("max_tokens",)
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = (*Latent.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    optional = T5
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModelWithProjection",),
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
        "text_encoder_3": ("transformers.T5EncoderModel",),
        "tokenizer": CLIP_TOKENIZERS,
        "tokenizer_2": CLIP_TOKENIZERS,
        "tokenizer_3": T5_TOKENIZERS,
        "transformer": ("diffusers.SD3Transformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @property
    def unused(self) -> Mapping[str, Any]:
        return dict.fromkeys(("image_encoder", "feature_extractor", *(() if self.config.t5 else T5)))

    def set_pipeline(self, pipeline: Any) -> None:
        lacking = [name for name in T5 if getattr(pipeline, name) is None]
        if len(lacking) == 1:
            raise UserError(
                f"{self.path} lacks {lacking[0]} but has the other half of T5; add it, or set family.t5=false."
            )
        super().set_pipeline(pipeline)

    @property
    def told_tokens(self) -> float:
        # Without T5 they are so many zeros.
        return super().told_tokens if self.pipeline.tokenizer_3 is not None else math.inf

    def largest(self, model: nn.Module) -> tuple[int, int]:
        return (model.config.pos_embed_max_size * model.config.patch_size,) * 2

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_tokens,
        )  # fmt: skip
        return {"prompt": states, "pooled": pooled}

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        return super().stock_call(guidance_scale) | {"max_sequence_length": self.config.max_tokens}
