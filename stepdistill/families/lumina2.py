"""Lumina-Image 2.0: flow matching in one stream of text and image, every sample's prompt of its own length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import GEMMA_TOKENIZERS
from stepdistill.families.schedulers import schedule_of
from stepdistill.schedule import Schedule


class Lumina2Transformer(TransformerFace):
    """cond: prompt (B, L, 2304) and its mask (B, L), 1 for words, which come first, and 0 for padding."""

    stacks: ClassVar = {"layers": "behind each sample's words"}
    prunable: ClassVar = {"layers": "num_layers"}
    tail = ("norm_out",)
    refiners = ("context_refiner", "noise_refiner")
    # What it computes depends on how long each prompt is.
    traceable = False

    @property
    def width(self) -> int:
        return self.transformer.config.hidden_size

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: (B, 16, h, w). Its time grows with the signal, and its output is x0 - eps."""
        dtype, device = self.transformer.dtype, x_t.device
        return -self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=1 - t.to(device, torch.float32),
            encoder_hidden_states=cond["prompt"].to(dtype),
            encoder_attention_mask=cond["mask"].to(device),
            return_dict=False,
        )[0]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """Linear guidance, and each row of each channel as long as with the condition alone: its pipeline's rule."""
        guided = unconditional + scale * (conditional - unconditional)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def image_part(self, name: str, output: Tensor, x_t: Tensor, cond: Cond) -> Tensor:
        count = self.tokens(x_t)
        lengths = cond["mask"].sum(1).tolist()
        return torch.stack([each[words : words + count] for each, words in zip(output, lengths, strict=True)])


class Lumina2(Latent):
    """Lumina2Pipeline. A prompt is told behind a system prompt, a negative one is not."""

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: that prompts, with the system prompt, are cut at; padding is masked.
            system_prompt: what is told before each prompt; "" = the pipeline's own.
        """

        max_tokens: int = 256
        system_prompt: str = ""

    name = "lumina2"
    pipelines = ("Lumina2Pipeline",)
    face = Lumina2Transformer
    default_guidance = 4.0
    kept = ("max_tokens", "system_prompt")
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.Gemma2Model",),
        "tokenizer": GEMMA_TOKENIZERS,
        "transformer": ("diffusers.Lumina2Transformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    def process(self) -> tuple[Schedule, str]:
        # Where its scheduler shifts by an image's tokens, the pipeline tells it the number of channels.
        return schedule_of(self.scheduler, self.shape[0], self.passes_sigmas)

    def largest(self, model: nn.Module) -> tuple[int, int]:
        tokens, rows, columns = model.config.axes_lens
        if self.config.max_tokens >= tokens:
            raise UserError(
                f"family.max_tokens={self.config.max_tokens}: this teacher has positions for {tokens - 1} tokens of text;"
                " ask for fewer."
            )
        patch = model.config.patch_size
        return rows * patch, columns * patch

    def encode(self, prompts: Sequence[str]) -> Cond:
        return self._states(negative=False, prompts=prompts)

    def encode_negative(self, prompts: Sequence[str]) -> Cond:
        return self._states(negative=True, prompts=prompts)

    @torch.no_grad()
    def _states(self, prompts: Sequence[str], negative: bool) -> Cond:
        prompts = list(prompts)
        told = {
            "system_prompt": self.config.system_prompt or None,
            "max_sequence_length": self.config.max_tokens,
        }
        states, mask, without, its_mask = self.pipeline.encode_prompt(
            prompts, negative, negative_prompt=prompts if negative else None, device=self.device, **told
        )
        return {"prompt": without, "mask": its_mask} if negative else {"prompt": states, "mask": mask}

    def worded(self, prompts: Sequence[str]) -> list[str]:
        system = self.config.system_prompt or self.pipeline.system_prompt
        return [f"{system} <Prompt Start> {prompt}" for prompt in prompts]

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told: dict[str, Any] = {"max_sequence_length": self.config.max_tokens}
        if self.config.system_prompt:
            told["system_prompt"] = self.config.system_prompt
        return super().stock_call(guidance_scale) | told
