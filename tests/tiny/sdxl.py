from __future__ import annotations

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from tiny.parts import clip_text, clip_tokenizer, kl_vae


def build(scheduler=None) -> StableDiffusionXLPipeline:
    """32x32 images, 8x8 latents."""
    one, two = clip_tokenizer(), clip_tokenizer(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=(1, 2), block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=64, use_linear_projection=True, norm_num_groups=8,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=kl_vae(scaling_factor=0.13025), unet=unet, tokenizer=one, tokenizer_2=two, text_encoder=clip_text(one),
        text_encoder_2=clip_text(two, cls=CLIPTextModelWithProjection),
        scheduler=scheduler or EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        ),
    )  # fmt: skip
