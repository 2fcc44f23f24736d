from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tiny.parts import gemma_tokenizer, kl_vae


def build(dynamic: bool = False) -> Lumina2Pipeline:
    """64x64 images of 4x4 tokens. dynamic: its times are shifted by the number of channels, as the pipeline has it."""
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(512, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, attn_implementation="eager",
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=transformer, vae=kl_vae(blocks=4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Gemma2Model(text), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic),
    )  # fmt: skip
