"""Untrained pipelines in the shape of larger models, around the embedded VAE and text encoder: teachers that train on
the drawn scenes in minutes of a CPU.

python -m training.embedded.shapes sdxl runs/shapes/sdxl
accelerate launch -m training.train training/recipes/shapes_sdxl_teacher.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepdistill import assets
from stepdistill.errors import atomic_write, cli_errors

# Words of a caption, with its longest; padding fills the rest.
TOKENS = 24


def sdxl() -> Any:
    """A StableDiffusionXLPipeline: two text encoders side by side, pooled text and sizes beside the time. It begins as
    the embedded teacher does, to which the second encoder says nothing at first.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    teacher, clip = assets.path("teacher"), assets.path("clip")
    tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer")
    first = CLIPTextModel.from_pretrained(teacher / "text_encoder").float()
    second = CLIPTextModelWithProjection.from_pretrained(clip).float()
    width, pooled = first.config.hidden_size + second.config.hidden_size, second.config.projection_dim
    embedded = UNet2DConditionModel.from_pretrained(teacher / "unet").float()
    added = {
        "cross_attention_dim": width, "addition_embed_type": "text_time", "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + pooled,
    }  # fmt: skip
    unet = UNet2DConditionModel.from_config(dict(embedded.config) | added)
    _start_from(unet, embedded.state_dict())
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(teacher / "vae").float(), unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=first, text_encoder_2=second, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def flux() -> Any:
    """A FluxPipeline without embedded guidance. Its T5 has random weights: words it can tell apart are all the
    transformer needs.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

    teacher = assets.path("teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer")
    words = [word.removesuffix("</w>") for word in tokenizer.get_vocab() if word[0].isalpha()]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in sorted(words))]
    spelled = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=TOKENS)
    text = CLIPTextModel.from_pretrained(teacher / "text_encoder").float()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(spelled), d_model=96, d_kv=24, d_ff=192, num_layers=1, num_heads=4, use_cache=False,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=96, pooled_projection_dim=text.config.hidden_size, guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return FluxPipeline(
        vae=AutoencoderKL.from_pretrained(teacher / "vae", shift_factor=0.0).float(), transformer=transformer,
        tokenizer=tokenizer, tokenizer_2=spelled, text_encoder=text, text_encoder_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def sd3() -> Any:
    """A StableDiffusion3Pipeline without T5: joint blocks over 8x8 latents and the words of the embedded CLIP, which stands
    in both places.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    teacher = assets.path("teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer")
    text = CLIPTextModelWithProjection.from_pretrained(assets.path("clip")).float()
    vae = AutoencoderKL.from_pretrained(teacher / "vae", shift_factor=0.0).float()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels,
        num_layers=6, attention_head_dim=32, num_attention_heads=4, caption_projection_dim=128, qk_norm="rms_norm",
        joint_attention_dim=2 * text.config.hidden_size, pooled_projection_dim=2 * text.config.projection_dim,
        pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer,
        tokenizer_2=tokenizer, text_encoder=text, text_encoder_2=text, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _start_from(unet: Any, weights: dict[str, Any]) -> None:
    """Load `weights`, of narrower inputs or none; what they lack is zero, so that nothing changes at first."""
    own = unet.state_dict()
    for name, tensor in own.items():
        if name in weights:
            # Keys and values of a wider text: the first encoder's part.
            tensor.zero_()[tuple(map(slice, weights[name].shape))] = weights[name]
    for name in ("add_embedding.linear_2.weight", "add_embedding.linear_2.bias"):
        own[name].zero_()


SHAPES: dict[str, Callable[[], Any]] = {"sdxl": sdxl, "flux": flux, "sd3": sd3}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0].replace("\n", " "))
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path, help="where the pipeline is to lie")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    given = parser.parse_args()
    with cli_errors(), atomic_write(given.directory) as temporary:
        torch.manual_seed(given.seed)
        SHAPES[given.shape]().save_pretrained(temporary, safe_serialization=True)


if __name__ == "__main__":
    main()
