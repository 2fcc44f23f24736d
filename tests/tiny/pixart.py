from __future__ import annotations

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tiny.parts import kl_vae, t5_text, t5_tokenizer


def build(
    sigma: bool, sample_size: int = 8, scheduler: Any = None
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """32x32 images, 8x8 latents. At sample_size 128 alpha is told its image's size."""
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=24,
        sample_size=sample_size, patch_size=2, caption_channels=32, use_additional_conditions=sample_size == 128 and not sigma,
    )  # fmt: skip
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        vae=kl_vae(scaling_factor=0.13025 if sigma else 0.18215), transformer=transformer, tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer), scheduler=scheduler or DPMSolverMultistepScheduler(beta_end=0.02),
    )  # fmt: skip
