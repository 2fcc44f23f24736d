from __future__ import annotations

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny.parts import kl_vae, t5_text, t5_tokenizer


def build() -> ChromaPipeline:
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer, tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
