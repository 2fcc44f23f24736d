from __future__ import annotations

from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from transformers import BertConfig, BertModel

from tiny.parts import bert_tokenizer, kl_vae, t5_text, t5_tokenizer


def build(learn_sigma: bool = True) -> HunyuanDiTPipeline:
    """64x64 images, 8x8 latents; v prediction, its table steeper than Stable Diffusion's."""
    one, two = bert_tokenizer(), t5_tokenizer()
    text = BertModel(
        BertConfig(vocab_size=len(one), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32),
    )  # fmt: skip
    transformer = HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=77, text_len_t5=256,
        learn_sigma=learn_sigma,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    return HunyuanDiTPipeline(
        vae=kl_vae(blocks=4, scaling_factor=0.13025), text_encoder=text, tokenizer=one, transformer=transformer,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        text_encoder_2=t5_text(two), tokenizer_2=two,
    )  # fmt: skip
