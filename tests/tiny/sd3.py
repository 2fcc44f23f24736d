from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tiny.parts import clip_text, clip_tokenizer, kl_vae, t5_text, t5_tokenizer


def build(t5: bool = True, three_five: bool = False) -> StableDiffusion3Pipeline:
    """32x32 images by default, up to 64x64; 3.5 normalises queries and keys and has a second attention in one block."""
    one, two = clip_tokenizer(), clip_tokenizer(pad_token="!")
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if three_five else {}
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=32, out_channels=16, pos_embed_max_size=8, **newer,
    )  # fmt: skip
    tokenizer = t5_tokenizer() if t5 else None
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(16, scaling_factor=1.5305, shift_factor=0.0609), tokenizer=one, tokenizer_2=two,
        text_encoder=clip_text(one, 16, CLIPTextModelWithProjection),
        text_encoder_2=clip_text(two, 16, CLIPTextModelWithProjection),
        tokenizer_3=tokenizer, text_encoder_3=t5_text(tokenizer) if t5 else None,
    )  # fmt: skip
