"""HunyuanDiT: a transformer with long skips on 2x2 patches, told a bilingual CLIP's and mT5's states side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace, without_variance
from stepdistill.families.latent import Latent
from stepdistill.families.reading import CLIP_TOKENIZERS, T5_TOKENIZERS

# Tokens of each encoder, as many as the network has paddings for.
CLIP_TOKENS, T5_TOKENS = 77, 256
# Height and width that the pipeline says of its training images, whatever it draws.
ORIGINAL = (1024, 1024)


class HunyuanTransformer(TransformerFace):
    """cond: prompt (B, 77, 1024) and mask (B, 77) of CLIP or BERT, prompt_2 (B, 256, 2048) and mask_2 (B, 256) of mT5,
    sizes (B, 6): original height and width, target height and width, crop's top and left, in pixels.
    """

    stacks: ClassVar = {"blocks": "whole"}
    unpruned = "its second half takes what the first leaves, block by block"

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        model, device = self.transformer, x_t.device
        raw = model(
            x_t.to(model.dtype),
            # The type of its time is that of all it is told, as its pipeline has it.
            t.to(device, model.dtype),
            encoder_hidden_states=cond["prompt"].to(model.dtype),
            text_embedding_mask=cond["mask"].to(device),
            encoder_hidden_states_t5=cond["prompt_2"].to(model.dtype),
            text_embedding_mask_t5=cond["mask_2"].to(device),
            # A view of one row repeated cannot be flattened.
            image_meta_size=cond["sizes"].float().contiguous(),
            style=torch.zeros(len(x_t), dtype=torch.int64, device=device),
            image_rotary_emb=rotary(model, *x_t.shape[-2:], device),
            return_dict=False,
        )[0]
        return without_variance(raw, x_t)


def rotary(model: nn.Module, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head dim) of a grid that is fitted into that of 512 pixels, as the pipeline makes them."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch = model.config.patch_size
    grid, base = (h // patch, w // patch), 512 // 8 // patch
    region = get_resize_crop_region_for_grid(grid, base)
    return get_2d_rotary_pos_embed(
        model.inner_dim // model.num_heads, region, grid, device=device, output_type="pt"
    )


class HunyuanDiT(Latent):
    """HunyuanDiTPipeline, at sizes as they are asked for (use_resolution_binning=False)."""

    name = "hunyuan_dit"
    pipelines = ("HunyuanDiTPipeline",)
    face = HunyuanTransformer
    default_guidance = 5.0
    init_noises = ("unit", "sigma")
    text_parts = ("text_encoder", "text_encoder_2")
    # None of them judges or describes images here.
    unused: ClassVar = {
        **dict.fromkeys(("safety_checker", "feature_extractor")),
        "requires_safety_checker": False,
    }
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.BertModel", "transformers.CLIPTextModel"),
        "text_encoder_2": ("transformers.T5EncoderModel", "transformers.MT5EncoderModel"),
        "tokenizer": ("transformers.BertTokenizer*", *CLIP_TOKENIZERS),
        "tokenizer_2": ("transformers.MT5Tokenizer*", *T5_TOKENIZERS),
        "transformer": ("diffusers.HunyuanDiT2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        if not model.config.learn_sigma:
            raise UserError(
                f"{self.path}: learn_sigma=false in transformer/config.json makes a network whose output its pipeline"
                " halves though there is no variance in it; no student of it could be drawn."
            )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        told = {"device": self.device, "do_classifier_free_guidance": False}
        encode = self.pipeline.encode_prompt
        states, _, mask, _ = encode(
            list(prompts), max_sequence_length=CLIP_TOKENS, text_encoder_index=0, **told
        )
        t5, _, t5_mask, _ = encode(list(prompts), max_sequence_length=T5_TOKENS, text_encoder_index=1, **told)
        sizes = torch.tensor([[*ORIGINAL, *self.resolution, 0, 0]], dtype=torch.float32, device=self.device)
        sizes = sizes.repeat(len(prompts), 1)
        return {"prompt": states, "mask": mask, "prompt_2": t5, "mask_2": t5_mask, "sizes": sizes}

    def sized(self, cond: Cond, sizes: Tensor) -> Cond:
        # As its pipeline, which says the same of every training image.
        told = cond["sizes"].clone()
        told[:, 2:4] = sizes[:, 4:]
        return cond | {"sizes": told}

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        return super().stock_call(guidance_scale) | {"use_resolution_binning": False}
