from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tiny.parts import gemma_text, gemma_tokenizer


def build(sprint: bool = False, scheduler: Any = None) -> SanaPipeline | SanaSprintPipeline:
    """32x32 images, 16x16 latents. Linear attention divides by what a ReLU leaves of a head, here enough not to be none."""
    own = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=16, **own,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate",
        downsample_block_type="conv", scaling_factor=0.41407,
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    pipeline, default = (
        (SanaSprintPipeline, SCMScheduler())
        if sprint
        else (SanaPipeline, FlowMatchEulerDiscreteScheduler(shift=3.0))
    )
    return pipeline(
        tokenizer=tokenizer, text_encoder=gemma_text(tokenizer), vae=vae, transformer=transformer,
        scheduler=scheduler or default,
    )  # fmt: skip
