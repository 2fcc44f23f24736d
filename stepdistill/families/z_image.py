"""Z-Image: flow matching in one stream of image and text, every sample's prompt of its own length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import QWEN_TOKENIZERS, chat

# Both kinds of tokens are filled up to a multiple of this.
GROUP = 32


class ZImageTransformer(TransformerFace):
    """cond: prompt (B, L, 2560) and its mask (B, L), 1 for words; the network is given the words alone."""

    stacks: ClassVar = {"layers": "first tokens"}
    prunable: ClassVar = {"layers": "n_layers"}
    tail = ("all_final_layer",)
    refiners = ("context_refiner", "noise_refiner")
    # What it computes depends on how long each prompt is.
    traceable = False
    patch = 2

    @property
    def width(self) -> int:
        return self.transformer.config.dim

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: (B, 16, h, w). Its time grows with the signal, and its output is x0 - eps."""
        dtype, device = self.transformer.dtype, x_t.device
        words = [
            states[told]
            for states, told in zip(cond["prompt"].to(dtype), cond["mask"].to(device).bool(), strict=True)
        ]
        frames = list(x_t.to(dtype)[:, :, None])
        raw = self.transformer(frames, 1 - t.to(device, torch.float32), words, return_dict=False)[0]
        return -torch.stack(raw)[:, :, 0]


class ZImage(Latent):
    """ZImagePipeline. Its guidance_scale w is g - 1: g = 1 is off."""

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: that prompts are cut at; shorter ones stay as they are.
        """

        max_tokens: int = 512

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    image_to_image = "ZImageImg2ImgPipeline"
    face = ZImageTransformer
    default_guidance = 6.0
    kept = ("max_tokens",)
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.Qwen3Model", "transformers.Qwen3ForCausalLM"),
        "tokenizer": QWEN_TOKENIZERS,
        "transformer": ("diffusers.ZImageTransformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @property
    def multiple(self) -> int:
        return self.stride * self.face.patch

    def default_side(self, model: nn.Module) -> int:
        # Its pipeline's default, in pixels.
        return 1024 // self.stride

    def largest(self, model: nn.Module) -> tuple[int, int]:
        tokens, rows, columns = model.config.axes_lens
        # One place before the words, and the image's first axis stands at the one behind them.
        text = -(-self.config.max_tokens // GROUP) * GROUP + 2
        if text > tokens:
            raise UserError(
                f"family.max_tokens={self.config.max_tokens}: this teacher has positions for {(tokens - 2) // GROUP * GROUP}"
                " tokens of text; ask for fewer."
            )
        return rows * self.face.patch, columns * self.face.patch

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        limit = self.config.max_tokens
        states, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=limit
        )
        filler = states[0].new_zeros(limit, states[0].shape[1])
        padded = pad_sequence([*states, filler], batch_first=True)[:-1]
        lengths = torch.tensor([len(each) for each in states], device=padded.device)
        return {
            "prompt": padded,
            "mask": (torch.arange(limit, device=padded.device) < lengths[:, None]).long(),
        }

    def worded(self, prompts: Sequence[str]) -> list[str]:
        return chat(self.pipeline.tokenizer, prompts, enable_thinking=True)

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        return super().stock_call(guidance_scale - 1) | {"max_sequence_length": self.config.max_tokens}
