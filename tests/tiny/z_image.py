from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tiny.parts import kl_vae, qwen3_text, qwen_tokenizer


def build() -> ZImagePipeline:
    """Of up to 64 x 64 tokens."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    # Zeros in a fresh model, so that padding would say nothing.
    transformer.x_pad_token.data.normal_()
    transformer.cap_pad_token.data.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3_text(tokenizer, 2), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip
