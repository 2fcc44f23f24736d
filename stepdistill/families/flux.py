"""FLUX.1 (dev with embedded guidance, schnell) and Chroma: flow matching on packed 2x2 patches, text and image in
joint blocks and then in single ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace, cast, pack, unpack
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import CLIP_TOKENIZERS, T5_TOKENIZERS


class FluxTransformer(TransformerFace):
    """cond: prompt (B, L, 4096) of T5, pooled (B, 768) of CLIP, and where guidance is embedded guidance (B,)."""

    stacks: ClassVar = {"transformer_blocks": "second", "single_transformer_blocks": "second"}
    prunable: ClassVar = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    # The transformer's own patch is 1: it takes latents packed already.
    patch = 2

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return super().extras | {"guidance": self.add_guidance}

    def add_guidance(self) -> None:
        """Let a network without one be told a guidance scale, which changes nothing at first."""
        if not self.transformer.config.guidance_embeds:
            self.transformer = _with_guidance(self.transformer).train(self.transformer.training)

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """guidance: (B,) the scale that is told in place of the condition's."""
        model, (h, w) = self.transformer, x_t.shape[-2:]
        dtype, device = model.dtype, x_t.device
        told = {"pooled_projections": cond["pooled"].to(dtype)}
        if model.config.guidance_embeds:
            scale = guidance if guidance is not None else cond["guidance"]
            told["guidance"] = scale.to(device, torch.float32)
        raw = model(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.to(device, torch.float32),
            encoder_hidden_states=cond["prompt"].to(dtype),
            txt_ids=torch.zeros(cond["prompt"].shape[1], 3, device=device),
            img_ids=image_ids(h // 2, w // 2, device),
            return_dict=False,
            **told,
        )[0]
        return unpack(raw, h, w)


class ChromaTransformer(TransformerFace):
    """cond: prompt (B, L, 4096) of T5 and its mask (B, L), which keeps one token of padding."""

    stacks: ClassVar = {"transformer_blocks": "second", "single_transformer_blocks": "last tokens"}
    patch = 2
    unpruned = "each is told its modulation by its place in a table that their numbers make"
    uncheckpointed = (
        "diffusers computes Chroma's single blocks again without the prompt's mask, and the gradients are those of"
        " another network"
    )

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        model, (h, w) = self.transformer, x_t.shape[-2:]
        dtype, device = model.dtype, x_t.device
        text = cond["mask"].to(device, dtype)
        raw = model(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.to(device, torch.float32),
            encoder_hidden_states=cond["prompt"].to(dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=image_ids(h // 2, w // 2, device),
            attention_mask=torch.cat((text, text.new_ones(len(text), h * w // 4)), 1),
            return_dict=False,
        )[0]
        return unpack(raw, h, w)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows x columns, 3): zero, row and column of each token, which its rotary embedding is made from."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)


def _with_guidance(model: nn.Module) -> nn.Module:
    """A copy of `model` with a guidance embedding whose last layer is zero."""
    twin = cast(
        type(model).from_config(dict(model.config) | {"guidance_embeds": True}), model.device, model.dtype
    )
    twin.load_state_dict(model.state_dict(), strict=False)
    last = twin.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return twin


class Flux(Latent):
    """FluxPipeline. Guidance g is the pipeline's true_cfg_scale, a second call with the empty prompt; the scale that a
    guidance-distilled network (dev) is told stays at `embedded_guidance`.
    """

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: of T5; padding is part of the prompt, so a student is told as many as it was trained with.
            embedded_guidance: what a network with embedded guidance is told, its training range being about 1 to 5.
        """

        max_tokens: int = 512
        embedded_guidance: float = 3.5

    name = "flux"
    pipelines = ("FluxPipeline",)
    image_to_image = "FluxImg2ImgPipeline"
    face = FluxTransformer
    default_guidance = 1.0
    kept = ("max_tokens", "embedded_guidance")
    unused: ClassVar = dict.fromkeys(("image_encoder", "feature_extractor"))
    text_parts = ("text_encoder", "text_encoder_2")
    lora_targets = (
        *Latent.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp", "proj_out",
    )  # fmt: skip
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModel",),
        "text_encoder_2": ("transformers.T5EncoderModel",),
        "tokenizer": CLIP_TOKENIZERS,
        "tokenizer_2": T5_TOKENIZERS,
        "transformer": ("diffusers.FluxTransformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @property
    def multiple(self) -> int:
        return 2 * self.stride

    def default_side(self, model: nn.Module) -> int:
        return self.pipeline.default_sample_size

    def latent_shape(self, model: nn.Module, height: int, width: int) -> tuple[int, ...]:
        return (model.config.in_channels // 4, height // self.stride, width // self.stride)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        states, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.config.max_tokens
        )
        scale = torch.full((len(prompts),), self.config.embedded_guidance, device=self.device)
        return {"prompt": states, "pooled": pooled, "guidance": scale}

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told = {
            "guidance_scale": self.config.embedded_guidance,
            "max_sequence_length": self.config.max_tokens,
        }
        if guidance_scale != 1:
            told |= {"true_cfg_scale": guidance_scale, "negative_prompt": ""}
        return super().stock_call(1.0) | told

    def from_stock_noise(self, noise: Tensor) -> Tensor:
        return unpack(noise, *self.shape[-2:])


class Chroma(Flux):
    """ChromaPipeline: guided by a second call, with a mask for its prompt."""

    name = "chroma"
    pipelines = ("ChromaPipeline",)
    image_to_image = "ChromaImg2ImgPipeline"
    face = ChromaTransformer
    default_guidance = 5.0
    kept = ("max_tokens",)
    text_parts = ("text_encoder",)
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.T5EncoderModel",),
        "tokenizer": T5_TOKENIZERS,
        "transformer": ("diffusers.ChromaTransformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        states, _, mask, *_ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_tokens,
        )  # fmt: skip
        return {"prompt": states, "mask": mask}

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told = {"guidance_scale": guidance_scale, "max_sequence_length": self.config.max_tokens}
        return super().stock_call(1.0) | told
