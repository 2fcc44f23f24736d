"""Stable Diffusion 1.x / 2.x: UNet2DConditionModel + CLIPTextModel + AutoencoderKL, eps or v prediction.

The embedded miniature has the same layout, so what works on it works on the full-size models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill import assets
from stepdistill.card import Card
from stepdistill.denoiser import Cond, Denoiser
from stepdistill.errors import UserError, first_line
from stepdistill.families.base import (
    BEHIND_MIDDLE,
    Family,
    cast,
    read_pipeline,
    sinusoids,
    unet_blocks,
)
from stepdistill.families.schedulers import few_step_scheduler, schedule_of
from stepdistill.untrusted import LOADING, check_directory

# Of the files a component without a pipeline is read from.
SUFFIXES = (".json", ".txt", ".safetensors")
# Of the embedded guidance scale or end time, LCM's time_cond_proj_dim.
COND_PROJ_DIM = 256


class ConditionedUNet(nn.Module):
    """The face of a UNet2DConditionModel; cond is the text encoder's states (B, tokens, width)."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return {"guidance": self.add_cond_proj, "end": self.add_cond_proj}

    @property
    def blocks(self) -> dict[str, int]:
        return unet_blocks(self.unet)

    middle, behind_middle = "unet.mid_block", BEHIND_MIDDLE

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor,
        guidance: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """guidance: (B,) the scale g; the embedding is of w = g - 1, as the exported pipeline makes it. end:
        (B,) the time a two-time student jumps to. A UNet is told one of the two, through time_cond_proj.
        """
        dtype = self.unet.dtype
        scalar = guidance - 1 if guidance is not None else end / 1000 if end is not None else None
        embedded = None
        if scalar is not None:
            embedded = sinusoids(scalar, self.unet.config.time_cond_proj_dim).to(x_t.device, dtype)
        return self.unet(
            x_t.to(dtype), t.to(x_t.device, torch.float32), cond.to(dtype), timestep_cond=embedded
        ).sample

    def add_cond_proj(self) -> None:
        """Give the UNet an embedded guidance scale or end time; its projection starts at zero, so nothing
        changes at first.
        """
        if self.unet.config.time_cond_proj_dim is None:
            self.unet = with_time_cond(self.unet).train(self.unet.training)


def with_time_cond(unet: nn.Module) -> nn.Module:
    """A copy of `unet` with a zero time_cond_proj.

    A stock pipeline never runs classifier-free guidance on such a UNet, which is what a guidance-free student
    wants too.
    """
    config = dict(unet.config) | {"time_cond_proj_dim": COND_PROJ_DIM}
    # Of a UNet made from a partial configuration; it would undo ours.
    config.pop("_use_default_values", None)
    twin = cast(type(unet).from_config(config), unet.device, unet.dtype)
    missing, unexpected = twin.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    nn.init.zeros_(twin.time_embedding.cond_proj.weight)
    return twin


class SD(Family):
    """Prompts, latents of the pipeline's VAE, classifier-free guidance with the empty prompt."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    conditions = "prompt"
    default_guidance = 3.0
    init_noises = ("unit", "sigma")
    latent = True
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModel",),
        "tokenizer": (
            "transformers.CLIPTokenizer*",
            "transformers.PreTrainedTokenizerFast",
            "transformers.TokenizersBackend",
        ),
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @dataclass
    class Config:
        # Pipeline directory or hub id; "assets/..." is found wherever the package lies.
        teacher: str = "assets/teacher"
        # Only for student.init=random: the UNet2DConditionModel's configuration and what it learns to
        # predict.
        unet: dict[str, Any] = field(default_factory=dict)
        # The same beside a teacher: a smaller student.
        student_unet: dict[str, Any] = field(default_factory=dict)
        prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"

    def __init__(self, config: SD.Config):
        self.config, self.metrics = config, {}
        path = Path(config.teacher)
        if path.parts[:1] == ("assets",) and not path.exists():
            path = assets.path(path.parts[1])
        self.path = path
        if config.unet:
            self._set_components(_components(path))
            self.teacher, self.pipeline = None, None
            self.scheduler = _teacher_scheduler(config.prediction_type)
            self.schedule, self.kind = schedule_of(self.scheduler)
            self.shape = (config.unet.get("in_channels", 4), *self._latent_size())
        else:
            # Neither judges nor describes images here, so neither is loaded.
            unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
            self._set_pipeline(read_pipeline(path, type(self), **unused, requires_safety_checker=False))

    @classmethod
    def from_directory(cls, path: Path) -> SD:
        return cls(cls.Config(teacher=str(path)))

    def _set_pipeline(self, pipeline: Any) -> None:
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self._set_components({name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")})
        self.schedule, self.kind = schedule_of(pipeline.scheduler)
        self.teacher = (
            Denoiser(ConditionedUNet(pipeline.unet), self.kind, self.schedule).eval().requires_grad_(False)
        )
        size = pipeline.unet.config.sample_size
        self.shape = (pipeline.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        self.resolution = tuple(side * self.vae_scale for side in self.shape[1:])

    def _set_components(self, parts: dict[str, Any]) -> None:
        self.vae, self.text_encoder, self.tokenizer = parts["vae"], parts["text_encoder"], parts["tokenizer"]
        for module in (self.vae, self.text_encoder):
            module.eval().requires_grad_(False)
        self._empty: Tensor | None = None
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _latent_size(self) -> tuple[int, int]:
        size = self.config.unet.get("sample_size", 8)
        self.resolution = (size * self.vae_scale,) * 2
        return size, size

    def modules(self) -> dict[str, nn.Module]:
        return {"text": self.text_encoder, "decoder": self.vae}

    def parameters(self) -> dict[str, int]:
        decoder = sum(
            p.numel()
            for part in (self.vae.decoder, self.vae.post_quant_conv)
            if part
            for p in part.parameters()
        )
        return super().parameters() | {"decoder": decoder}

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
        return Denoiser(ConditionedUNet(unet), self.kind, self.schedule)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """(N, tokens, width) states of the text encoder; prompts longer than the tokenizer's limit are cut."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = (
            tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        )
        mask = mask.to(self.text_encoder.device) if mask is not None else None
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device), attention_mask=mask)[0]

    def uncond(self, count: int) -> Cond:
        if self._empty is None or self._empty.device != self.text_encoder.device:
            # The same in every batch.
            self._empty = self.encode([""])
        return self._empty.expand(count, -1, -1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        pixels = images.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        # The mean, not a draw: a sample's latent must not depend on when it was encoded.
        return self.vae.encode(pixels).latent_dist.mean.float() * self.vae.config.scaling_factor

    def latent_key(self) -> str:
        digest = hashlib.sha256()
        for name, parameter in sorted(self.vae.state_dict().items()):
            digest.update(name.encode() + parameter.float().cpu().numpy().tobytes())
        return f"mean {self.vae.config.scaling_factor} {digest.hexdigest()}"

    def decode(self, x0: Tensor) -> Tensor:
        return self.vae.decode(x0.to(self.vae.dtype) / self.vae.config.scaling_factor).sample / 2 + 0.5

    def export(self, student: Denoiser, directory: Path, card: Card) -> None:
        from diffusers import StableDiffusionPipeline

        unet = student.network.unet
        if card.kind == "teacher":
            scheduler = self.scheduler
        else:
            unet = unet if unet.config.time_cond_proj_dim else with_time_cond(unet)
            scheduler = few_step_scheduler(self.scheduler, card.sampling)
        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(directory, safe_serialization=True)


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
        if not path.is_dir() and text.count("/") == 1:
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
    except LOADING as error:
        raise UserError(
            f"family.teacher={text}: cannot load vae, text_encoder and tokenizer: {first_line(error)}"
        ) from None
