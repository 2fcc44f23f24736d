"""PixArt-alpha and PixArt-Sigma: a transformer on 2x2 patches of latents, told the prompt by cross-attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace, without_variance
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import T5_TOKENIZERS


class PixArtTransformer(TransformerFace):
    """cond: prompt (B, L, 4096) of T5 and its mask (B, L); of alpha at 1024 pixels resolution (B, 2), height and width
    in pixels, and aspect_ratio (B, 1), height / width.
    """

    prunable: ClassVar = {"transformer_blocks": "num_layers"}

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        model = self.transformer
        # Sizes stay float32: half precision knows no 1023.
        sizes = {
            name: cond[name].float() if name in cond else None for name in ("resolution", "aspect_ratio")
        }
        raw = model(
            hidden_states=x_t.to(model.dtype),
            encoder_hidden_states=cond["prompt"].to(model.dtype),
            encoder_attention_mask=cond["mask"].to(x_t.device),
            timestep=t.to(x_t.device, torch.float32),
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return without_variance(raw, x_t)


class PixArt(Latent):
    """PixArtAlphaPipeline and PixArtSigmaPipeline, at sizes as they are asked for (use_resolution_binning=False) and
    with prompts as they are written (clean_caption=False).
    """

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: of a prompt; 0 = as many as the pipeline takes, 120 of alpha and 300 of Sigma.
        """

        max_tokens: int = 0

    name = "pixart"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    face = PixArtTransformer
    default_guidance = 4.5
    init_noises = ("unit", "sigma")
    kept = ("max_tokens",)
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"),
        "text_encoder": ("transformers.T5EncoderModel",),
        "tokenizer": T5_TOKENIZERS,
        # As the published ones of alpha call it.
        "transformer": ("diffusers.PixArtTransformer2DModel", "diffusers.Transformer2DModel"),
        "scheduler": ("diffusers.*Scheduler",),
    }

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        told = type(self.pipeline).__name__ == "PixArtAlphaPipeline" and model.config.sample_size == 128
        if model.adaln_single.emb.use_additional_conditions and not told:
            raise UserError(
                f"{self.path}: use_additional_conditions in transformer/config.json makes a network that must be told"
                f" its image's size, which a {type(self.pipeline).__name__} of sample_size"
                f" {model.config.sample_size} does not tell; set it to false."
            )

    @property
    def max_tokens(self) -> int:
        own = 120 if type(self.pipeline).__name__ == "PixArtAlphaPipeline" else 300
        return self.config.max_tokens or own

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        states, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_tokens,
        )
        cond = {"prompt": states, "mask": mask}
        if self.pipeline.transformer.adaln_single.emb.use_additional_conditions:
            height, width = self.resolution
            size = torch.tensor([[height, width]], dtype=torch.float32, device=self.device)
            ratio = torch.tensor([[height / width]], dtype=torch.float32, device=self.device)
            count = len(prompts)
            cond |= {"resolution": size.repeat(count, 1), "aspect_ratio": ratio.repeat(count, 1)}
        return cond

    def sized(self, cond: Cond, sizes: Tensor) -> Cond:
        if "resolution" not in cond:
            return cond
        size = sizes[:, 4:].to(cond["resolution"])
        return cond | {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told = {
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": self.max_tokens,
        }
        return super().stock_call(guidance_scale) | told
