from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tiny.parts import clip_text, clip_tokenizer, kl_vae, t5_text, t5_tokenizer


def build(guidance: bool) -> FluxPipeline:
    """dev with a guidance embedding and shifts by resolution, or schnell."""
    one, two = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer, tokenizer=one, tokenizer_2=two,
        text_encoder=clip_text(one), text_encoder_2=t5_text(two),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
    )  # fmt: skip
