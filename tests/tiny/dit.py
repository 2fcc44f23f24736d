from __future__ import annotations

from typing import Any

from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

from tiny.parts import kl_vae


def build(scheduler: Any = None) -> DiTPipeline:
    """32x32 images, 8x8 latents. Its classes are 1000, whose "none" the pipeline has hard-coded."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(
        transformer=transformer, vae=kl_vae(scaling_factor=0.18215),
        scheduler=scheduler or DPMSolverMultistepScheduler(beta_end=0.02),
    )  # fmt: skip
