"""FLUX.2: dev, told a guidance scale, and Klein. Flow matching on 2x2 patches of a VAE's latents, normalised by the
statistics of its batch norm, with three middle layers of a language model side by side for text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace, pack, unpack
from stepdistill.families.latent import ByChannel, Latent, LatentConfig
from stepdistill.families.reading import QWEN_TOKENIZERS, chat
from stepdistill.schedule import Flow, Schedule

# Pixels of the VAE's latents along a side of what the transformer takes as one.
PATCH = 2


class Flux2Transformer(TransformerFace):
    """cond: prompt (B, L, 15360) of three layers, and where guidance is embedded guidance (B,)."""

    stacks: ClassVar = {"transformer_blocks": "second", "single_transformer_blocks": "last tokens"}
    prunable: ClassVar = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    last_stack_only = ("single_stream_modulation",)
    # The latents are patches already.
    patch = 1

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        # Klein's pipeline has no scale to tell.
        told = {"guidance": lambda: None} if self.transformer.config.guidance_embeds else {}
        return super().extras | told

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """x_t: (B, 128, h, w). guidance: (B,) the scale that is told in place of the condition's."""
        model, (h, w) = self.transformer, x_t.shape[-2:]
        dtype, device, tokens = model.dtype, x_t.device, cond["prompt"].shape[1]
        scale = None
        if model.config.guidance_embeds:
            scale = (guidance if guidance is not None else cond["guidance"]).to(device, torch.float32)
        raw = model(
            hidden_states=pack(x_t.to(dtype), 1),
            timestep=t.to(device, torch.float32),
            guidance=scale,
            encoder_hidden_states=cond["prompt"].to(dtype),
            txt_ids=positions(1, 1, 1, tokens, device=device),
            img_ids=positions(1, h, w, 1, device=device),
            return_dict=False,
        )[0]
        return unpack(raw, h, w, 1)


def positions(*axes: int, device: torch.device) -> Tensor:
    """(N, 4): time, row, column and place in the text of each token, which its rotary embedding is made from."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in axes))


def mu(tokens: int, steps: int) -> float:
    """The exponent of the shift e^mu by an image's tokens and the number of steps, as its authors fitted it: linear in
    the tokens at 10 steps and at 200, and between those linear in the steps. Beyond 4300 tokens all are as 200.
    """
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)


def shift(tokens: int, steps: int) -> float:
    return exp(mu(tokens, steps))


class Flux2(ByChannel):
    """Flux2Pipeline and Flux2KleinPipeline.

    Guidance g of Klein is a second call with the empty prompt. dev's pipeline makes none: the scale its network is
    told is `embedded_guidance`, and a g above 1 is for methods that guide their teacher.
    """

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: of a prompt; padding is part of it, so a student is told as many as it was trained with.
            embedded_guidance: what a network with embedded guidance (dev) is told.
        """

        max_tokens: int = 512
        embedded_guidance: float = 4.0

    name = "flux2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    face = Flux2Transformer
    kept = ("max_tokens", "embedded_guidance")
    # Of Klein: its pipeline then never guides, whatever scale it is called with.
    student_settings: ClassVar = {"is_distilled": True}
    lora_targets = (
        *Latent.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    )  # fmt: skip
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKLFlux2",),
        "text_encoder": ("transformers.Mistral3ForConditionalGeneration", "transformers.Qwen3ForCausalLM"),
        "tokenizer": ("transformers.PixtralProcessor", *QWEN_TOKENIZERS),
        "transformer": ("diffusers.Flux2Transformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    def set_pipeline(self, pipeline: Any) -> None:
        super().set_pipeline(pipeline)
        self.embedded = pipeline.transformer.config.guidance_embeds
        self.klein = "is_distilled" in pipeline.config
        self.default_guidance = 4.0 if self.klein and not pipeline.config.is_distilled else 1.0

    @property
    def stride(self) -> int:
        return PATCH * self.pipeline.vae_scale_factor

    @property
    def multiple(self) -> int:
        return self.stride

    def default_side(self, model: nn.Module) -> int:
        return self.pipeline.default_sample_size // PATCH

    def process(self) -> tuple[Schedule, str]:
        schedule, kind = super().process()
        if self.scheduler.config.get("use_dynamic_shifting"):
            schedule = Flow(partial(shift, self.image_tokens), terminal=schedule.terminal)
        return schedule, kind

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        states, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.config.max_tokens
        )
        if not self.embedded:
            return {"prompt": states}
        scale = torch.full((len(prompts),), self.config.embedded_guidance, device=self.device)
        return {"prompt": states, "guidance": scale}

    def worded(self, prompts: Sequence[str]) -> list[str]:
        if self.klein:
            return chat(self.pipeline.tokenizer, prompts, enable_thinking=False)
        system = {"role": "system", "content": [{"type": "text", "text": self.pipeline.system_message}]}
        told = ({"role": "user", "content": [{"type": "text", "text": prompt}]} for prompt in prompts)
        return [self.pipeline.tokenizer.apply_chat_template([system, user], tokenize=False) for user in told]

    def normalised(self, z: Tensor) -> Tensor:
        """(B, 32, 2h, 2w) -> (B, 128, h, w)."""
        return super().normalised(nnf.pixel_unshuffle(z, PATCH))

    def denormalised(self, x0: Tensor) -> Tensor:
        return nnf.pixel_shuffle(super().denormalised(x0), PATCH)

    def channel_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of the patches' channels, (128, 1, 1), which a batch norm of the VAE keeps."""
        norm = self.vae.bn
        variance = norm.running_var.view(-1, 1, 1) + self.vae.config.batch_norm_eps
        return norm.running_mean.view(-1, 1, 1).to(like), variance.sqrt().to(like)

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        scale = self.config.embedded_guidance if self.embedded else guidance_scale
        return super().stock_call(scale) | {"max_sequence_length": self.config.max_tokens}

    def from_stock_noise(self, noise: Tensor) -> Tensor:
        return unpack(noise, *self.shape[-2:], 1)
