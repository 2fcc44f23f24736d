from __future__ import annotations

from diffusers import (
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from tiny.parts import clip_text, clip_tokenizer, kl_vae


def build(inpaint: bool = False) -> StableDiffusionPipeline | StableDiffusionInpaintPipeline:
    """As 1.5: eps prediction, a PNDM scheduler. 32x32 images, 8x8 latents. inpaint: told a mask and what it leaves."""
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9 if inpaint else 4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
    )  # fmt: skip
    made = StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline
    return made(
        vae=kl_vae(scaling_factor=0.18215), unet=unet, tokenizer=tokenizer, text_encoder=clip_text(tokenizer),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
