"""Qwen-Image: flow matching on packed 2x2 patches of a video VAE's single frame, text and image in joint blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace, pack, unpack
from stepdistill.families.latent import ByChannel, Latent, LatentConfig
from stepdistill.families.reading import QWEN_TOKENIZERS


class QwenImageTransformer(TransformerFace):
    """cond: prompt (B, L, 3584) and its mask (B, L), 1 for words and 0 for padding, which is not heard."""

    stacks: ClassVar = {"transformer_blocks": "second"}
    prunable: ClassVar = {"transformer_blocks": "num_layers"}
    text_only = (*TransformerFace.text_only[:-1], "txt_mlp")

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: (B, 16, h, w)."""
        model, (h, w) = self.transformer, x_t.shape[-2:]
        dtype, device = model.dtype, x_t.device
        raw = model(
            hidden_states=pack(x_t.to(dtype), self.patch),
            timestep=t.to(device, torch.float32),
            encoder_hidden_states=cond["prompt"].to(dtype),
            encoder_hidden_states_mask=cond["mask"].to(device),
            img_shapes=[[(1, h // self.patch, w // self.patch)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(raw, h, w, self.patch)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """Linear guidance, and each token as long as it is with the condition alone: its pipeline's rule."""
        h, w = conditional.shape[-2:]
        guided = pack(unconditional + scale * (conditional - unconditional), self.patch)
        length = pack(conditional, self.patch).norm(dim=-1, keepdim=True)
        return unpack(guided * (length / guided.norm(dim=-1, keepdim=True)), h, w, self.patch)


class QwenImage(ByChannel):
    """QwenImagePipeline. Guidance g is its true_cfg_scale: a second call with the prompt " "."""

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: that prompts are padded to and cut at; padding is masked, so fewer cost less and change
                nothing for shorter prompts.
        """

        max_tokens: int = 512

    name = "qwen_image"
    pipelines = ("QwenImagePipeline",)
    image_to_image = "QwenImageImg2ImgPipeline"
    face = QwenImageTransformer
    default_guidance = 4.0
    empty_prompt = " "
    kept = ("max_tokens",)
    lora_targets = (*Latent.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKLQwenImage",),
        "text_encoder": ("transformers.Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": QWEN_TOKENIZERS,
        "transformer": ("diffusers.QwenImageTransformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    def check_model(self, model: nn.Module) -> None:
        if model.config.guidance_embeds:
            raise UserError(
                f"the transformer at {self.path} says guidance_embeds=true, a layout of Qwen-Image that diffusers has no"
                " embedding for, so its own pipeline cannot call it either; choose weights with guidance_embeds=false."
            )

    def default_side(self, model: nn.Module) -> int:
        return self.pipeline.default_sample_size

    def latent_shape(self, model: nn.Module, height: int, width: int) -> tuple[int, ...]:
        return (model.config.out_channels, height // self.stride, width // self.stride)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        limit = self.config.max_tokens
        states, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=limit
        )
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        missing = limit - states.shape[1]
        return {"prompt": nnf.pad(states, (0, 0, 0, missing)), "mask": nnf.pad(mask, (0, missing))}

    def cut(self, prompts: Sequence[str]) -> int:
        """As `Latent.cut`; the first words of the pipeline's template do not count, as their states are dropped."""
        if not len(prompts):
            return 0
        template, dropped = (
            self.pipeline.prompt_template_encode,
            self.pipeline.prompt_template_encode_start_idx,
        )
        told = self.pipeline.tokenizer(
            [template.format(prompt) for prompt in prompts], truncation=False
        ).input_ids
        return sum(len(ids) > self.config.max_tokens + dropped for ids in told)

    def encode_images(self, images: Tensor) -> Tensor:
        return super().encode_images(images[:, :, None])

    def latents_of(self, encoded: Any) -> Tensor:
        return encoded.latent_dist.mean[:, :, 0]

    def decode(self, x0: Tensor) -> Tensor:
        frame = self.denormalised(x0.to(self.vae.device, self.vae.dtype))[:, :, None]
        return (self.vae.decode(frame).sample[:, :, 0] / 2 + 0.5).to(x0.device)

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told = super().stock_call(guidance_scale) | {"max_sequence_length": self.config.max_tokens}
        # `guidance_scale` is for networks with embedded guidance.
        told["true_cfg_scale"] = told.pop("guidance_scale")
        return told | ({"negative_prompt": self.empty_prompt} if guidance_scale != 1 else {})

    def from_stock_noise(self, noise: Tensor) -> Tensor:
        return unpack(noise, *self.shape[-2:])
