from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tiny.parts import t5_tokenizer


def build(scheduler: Any = None, **settings: Any) -> WanPipeline:
    """4x4 latents of 32x32 pixels; 5 frames are 2 latent ones."""
    tokenizer = t5_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, is_encoder_decoder=False,
        use_cache=False,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text), transformer=transformer,
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0), **settings,
    )  # fmt: skip
