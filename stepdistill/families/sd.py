"""Stable Diffusion 1.x / 2.x: UNet2DConditionModel + CLIPTextModel + AutoencoderKL, eps or v prediction.

The embedded miniature has the same layout, so what works on it works on the full-size models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.errors import UserError, first_line
from stepdistill.families.encoders import limit_tokens
from stepdistill.families.faces import UNetFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import CLIP_TOKENIZERS, is_hub_id
from stepdistill.families.schedulers import schedule_of
from stepdistill.families.unets import check_unet, drop_variance
from stepdistill.untrusted import LOADING, check_directory

# Of the files a component without a pipeline is read from.
SUFFIXES = (".json", ".txt", ".safetensors")


class SD(Latent):
    """Prompts, latents of the pipeline's VAE, classifier-free guidance with the empty prompt."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    image_to_image = "StableDiffusionImg2ImgPipeline"
    face = UNetFace
    default_guidance = 3.0
    init_noises = ("unit", "sigma")
    # None of them judges or describes images here.
    unused: ClassVar = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    }
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"),
        "text_encoder": ("transformers.CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`, and a network that is trained from random weights.

        Attributes:
            unet: only for student.init=random: the UNet2DConditionModel's configuration; prediction_type: what it
                learns to predict. student_unet: the same beside a teacher, a smaller student.
        """

        teacher: str = "assets/teacher"
        unet: dict[str, Any] = field(default_factory=dict)
        student_unet: dict[str, Any] = field(default_factory=dict)
        prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"

    def open(self) -> None:
        if not self.config.unet:
            super().open()
            return
        if self.config.lora:
            raise UserError(
                "family.lora is merged into a teacher, and with family.unet there is none; leave one out."
            )
        self.teacher, self.pipeline, self._parts = None, None, _components(self.path)
        for module in self.modules().values():
            module.eval().requires_grad_(False)
        limit_tokens(self.tokenizers, self.modules(), self.path)
        self.scheduler = _teacher_scheduler(self.config.prediction_type)
        self.schedule, self.kind = schedule_of(self.scheduler)
        size = self.config.unet.get("sample_size", 8)
        self.resolution = (size * self.stride,) * 2
        self.shape = (self.config.unet.get("in_channels", 4), size, size)

    def set_pipeline(self, pipeline: Any) -> None:
        check_unet(pipeline.unet, self.path, [pipeline.vae.config.latent_channels], {})
        drop_variance(pipeline)
        super().set_pipeline(pipeline)

    def part(self, name: str) -> Any:
        return getattr(self.pipeline, name) if self.pipeline is not None else self._parts[name]

    @property
    def vae(self) -> nn.Module:
        return self.part("vae")

    @property
    def text_encoder(self) -> nn.Module:
        return self.part("text_encoder")

    @property
    def tokenizer(self) -> Any:
        return self.part("tokenizer")

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    @property
    def stride(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def modules(self) -> dict[str, nn.Module]:
        text = {"text_encoder": self.text_encoder} if self.text_encoder is not None else {}
        return text | {"decoder": self.vae}

    def fresh(self) -> Denoiser:
        from diffusers import UNet2DConditionModel

        config = self.config.unet or self.config.student_unet
        if not config:
            raise UserError(
                "student.init=random needs family.unet, the configuration of the UNet2DConditionModel to train,"
                " or family.student_unet beside a teacher."
            )
        try:
            unet = UNet2DConditionModel.from_config(
                dict(config) | {"cross_attention_dim": self.text_encoder.config.hidden_size}
            )
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"family.unet is no valid UNet2DConditionModel configuration: {first_line(error)}"
            ) from None
        return Denoiser(UNetFace(unet), self.kind, self.schedule)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """(N, tokens, width) states of the text encoder; prompts longer than the tokenizer's limit are cut."""
        tokens = self._tokens(prompts)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self.states(tokens.input_ids, tokens.attention_mask if masked else None)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """(N, tokens), what `states` makes conditions of where the encoder takes no mask."""
        return self._tokens(prompts).input_ids

    def states(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of the text encoder, (N, tokens, width)."""
        device = self.text_encoder.device
        return self.text_encoder(ids.to(device), attention_mask=None if mask is None else mask.to(device))[0]

    def _tokens(self, prompts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )

    def assembled(self, model: nn.Module, scheduler: Any, **settings: Any) -> Any:
        """A StableDiffusionPipeline, whatever the teacher's was, and without one as well."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=model, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def _teacher_scheduler(prediction_type: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
        prediction_type=prediction_type, timestep_spacing="trailing",
    )  # fmt: skip


def _components(path: Path) -> dict[str, Any]:
    """vae, text_encoder and tokenizer of a directory that has no UNet yet."""
    from diffusers import AutoencoderKL
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer, CLIPTextModel

    text, weights = str(path), {"dtype": torch.float32, "use_safetensors": True}
    try:
        if is_hub_id(path):
            wanted = [
                f"{part}/*{suffix}" for part in ("vae", "text_encoder", "tokenizer") for suffix in SUFFIXES
            ]
            path = Path(snapshot_download(text, allow_patterns=wanted))
        if path.is_dir():
            check_directory(path)
        return {
            "vae": AutoencoderKL.from_pretrained(path, subfolder="vae", **weights),
            "text_encoder": CLIPTextModel.from_pretrained(path, subfolder="text_encoder", **weights),
            "tokenizer": AutoTokenizer.from_pretrained(path, subfolder="tokenizer", trust_remote_code=False),
        }
    except UserError:
        raise
    except LOADING as error:
        raise UserError(
            f"family.teacher={text}: cannot load vae, text_encoder and tokenizer: {first_line(error)}"
        ) from None
