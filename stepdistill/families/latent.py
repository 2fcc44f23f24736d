"""What families of a VAE, text encoders and one denoiser have in common: everything but what the denoiser is told."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill import assets
from stepdistill.config import build
from stepdistill.denoiser import Cond, Denoiser, map_cond, parameter_count
from stepdistill.errors import UserError
from stepdistill.families.adapters import LoraFile, merge
from stepdistill.families.encoders import described, limit_tokens
from stepdistill.families.faces import UNetFace
from stepdistill.families.leaving import Leaving
from stepdistill.families.reading import commit_of, read_pipeline, understood
from stepdistill.families.schedulers import schedule_of
from stepdistill.schedule import Schedule

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class LatentConfig:
    """The recipe's section `family` of every family of latents.

    Attributes:
        teacher: pipeline directory or hub id; "assets/..." is found wherever the package lies.
        revision: of a hub id: a branch, a tag or, so that a run can be made again, a commit.
        variant: of the weights' files, such as "fp16"; "" = the plain ones.
        resolution: of images in pixels: [height, width], [side], or [] for the pipeline's own.
        dtype: of what is frozen; what is trained is float32.
        lora: LoRAs to merge into the teacher first, "PATH" or "PATH:scale" of safetensors files, one or a list.
    """

    teacher: str = ""
    revision: str = ""
    variant: str = ""
    resolution: tuple[int, ...] = ()
    dtype: Dtype = "float32"
    lora: str | tuple[str | LoraFile, ...] = ()

    def __post_init__(self) -> None:
        named = (self.lora,) if isinstance(self.lora, str) else self.lora
        self.lora = tuple(LoraFile.of(each) for each in named if each)
        if len(self.resolution) > 2 or any(side < 1 for side in self.resolution):
            raise ValueError(
                f"resolution must be [height, width] in pixels, or [side], got {list(self.resolution)}."
            )
        # Of those families whose prompts are cut where a recipe says.
        if (tokens := getattr(self, "max_tokens", 0)) < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {tokens}.")


class Latent(Leaving):
    """A stock pipeline with a VAE. A family of this kind says what its network is told (`face`), how prompts become
    conditions (`encode`), and what of the defaults below does not hold for it.

    Attributes:
        unused: components not loaded, and what from_pretrained is told in their place.
        kept: fields of `Config` that a student's directory must remember (`settings`), beside the resolution.
        empty_prompt: what guidance compares with where no negative prompt is given.
        scaled_by: what of its VAE makes latents of unit variance, for people.
        sides: what the pipeline wants both sides of an image to be a multiple of, whatever its network takes.
        lora_targets: layers that a LoRA adapts, by any component of their dotted names.
    """

    Config: ClassVar[type] = LatentConfig
    unused: ClassVar[Mapping[str, Any]] = {}
    kept: ClassVar[tuple[str, ...]] = ()
    empty_prompt: ClassVar[str] = ""
    scaled_by: ClassVar[str] = "scaling_factor"
    sides: ClassVar[int] = 1
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out")
    conditions = "prompt"
    latent = True

    def __init__(self, config: Any):
        self.config, self.metrics = config, {}
        self._empty: Cond = None
        path = Path(config.teacher)
        if path.parts[:1] == ("assets",) and not path.exists():
            path = assets.path(path.parts[1])
        self.path = path
        self.open()

    @classmethod
    def from_directory(
        cls, path: Path, settings: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> Latent:
        named = {"teacher": str(path), "dtype": str(dtype).removeprefix("torch.")}
        return cls(build(cls.Config, dict(settings or {}) | named, "family"))

    @property
    def settings(self) -> dict[str, Any]:
        kept = {name: getattr(self.config, name) for name in self.kept}
        return {"resolution": list(self.resolution)} | kept

    def open(self) -> None:
        """Load the pipeline and describe it."""
        if not self.config.teacher:
            raise UserError("family.teacher is missing; give a pipeline directory or a hub id.")
        config = self.config
        pipeline = read_pipeline(
            self.path, type(self), dtype=getattr(torch, config.dtype), revision=config.revision,
            variant=config.variant, **self.unused,
        )  # fmt: skip
        merge(pipeline, config.lora)
        with understood(self.path):
            self.set_pipeline(pipeline)

    @property
    def loras(self) -> tuple[dict[str, Any], ...]:
        return tuple(each.fact for each in self.config.lora)

    def load_text(self) -> None:
        gone = tuple(self._dropped)
        super().load_text()
        if gone and self.config.lora:
            merge(self.pipeline, self.config.lora, gone)

    def set_pipeline(self, pipeline: Any) -> None:
        """Describe a loaded pipeline: sizes, noise process, teacher. Any error where its configuration is nonsense."""
        self.pipeline, self.scheduler, self.revision = pipeline, pipeline.scheduler, commit_of(pipeline)
        for module in self.modules().values():
            module.eval().requires_grad_(False)
        limit_tokens(self.tokenizers, self.modules(), self.path)
        model = getattr(pipeline, self.face.inner)
        self.check_model(model)
        self.resolution = self.checked_resolution(model)
        self.shape = self.latent_shape(model, *self.resolution)
        # By the VAE's numbers.
        self.denormalised(torch.zeros(1, *self.shape))
        self.schedule, self.kind = self.process()
        network = self.face(model)
        network.lora_targets = self.lora_targets
        self.teacher = Denoiser(network, self.kind, self.schedule).eval().requires_grad_(False)

    def check_model(self, model: nn.Module) -> None:
        """Raise UserError for a network of a layout this family cannot serve."""

    # -------------------------------------------------------------------------------------------- what it is made of

    @property
    def device(self) -> torch.device:
        """Of the text encoders."""
        return next(next(iter(self.modules().values())).parameters()).device

    @property
    def vae(self) -> nn.Module:
        return self.pipeline.vae

    def modules(self) -> dict[str, nn.Module]:
        return self.text_modules() | {"decoder": self.vae}

    def parameters(self) -> dict[str, int]:
        modules = self.modules()
        vae = modules.pop("decoder")
        used = (getattr(vae, "decoder", vae), getattr(vae, "post_quant_conv", None))
        text = sum(map(parameter_count, modules.values()))
        return {"text": text, "decoder": sum(parameter_count(part) for part in used if part is not None)}

    # ------------------------------------------------------------------------------------------- sizes and the process

    @property
    def stride(self) -> int:
        """Pixels per latent, along each side."""
        return self.pipeline.vae_scale_factor

    @property
    def multiple(self) -> int:
        """What the sides of an image must be a multiple of for the network: `stride` times the side of a patch."""
        return self.stride * getattr(getattr(self.pipeline, self.face.inner).config, "patch_size", 1)

    def default_side(self, model: nn.Module) -> int | Sequence[int] | None:
        """The side of images in latents, or [h, w], where the recipe asks for none."""
        return getattr(model.config, "sample_size", None)

    def checked_resolution(self, model: nn.Module) -> tuple[int, int]:
        sides, default = tuple(self.config.resolution), self.default_side(model)
        if not sides and default is None:
            raise UserError(
                f"family.resolution: the pipeline at {self.path} says no size of its own;"
                " give [height, width] in pixels."
            )
        if not sides:
            sides = (default,) if isinstance(default, int) else tuple(default)
            sides = tuple(side * self.stride for side in sides)
        size = sides * 2 if len(sides) == 1 else sides
        self.check_size(model, size, f"family.resolution={list(size)}")
        return size

    def check_size(self, model: nn.Module, size: tuple[int, int], where: str) -> None:
        """Raise UserError for a (height, width) in pixels that the network cannot take; it begins with `where`."""
        multiple = math.lcm(self.multiple, self.sides)
        if size[0] % multiple or size[1] % multiple:
            raise UserError(
                f"{where}: both sides must be multiples of {multiple} for this {self.name!r} teacher."
            )
        rows, columns = (side * self.stride for side in self.largest(model) or size)
        if size[0] > rows or size[1] > columns:
            raise UserError(
                f"{where}: this {self.name!r} teacher has positions for at most {rows} x {columns} pixels; ask for less."
            )

    def shape_at(self, size: tuple[int, int]) -> tuple[int, ...]:
        if self.pipeline is None:
            return super().shape_at(size)
        model = getattr(self.pipeline, self.face.inner)
        self.check_size(model, tuple(size), f"data: a bucket of {list(size)}")
        return self.latent_shape(model, *size)

    def largest(self, model: nn.Module) -> tuple[int, int] | None:
        """(h, w) in latents where a network's table of positions ends; None = it has no such table."""
        return None

    def latent_shape(self, model: nn.Module, height: int, width: int) -> tuple[int, ...]:
        """Of one x0: (channels, height, width) in latents."""
        return (model.config.in_channels, height // self.stride, width // self.stride)

    @property
    def image_tokens(self) -> int:
        """Of one image, or video, in the transformer."""
        patch = self.multiple // self.stride
        return math.prod(self.shape[1:]) // patch**2

    def process(self) -> tuple[Schedule, str]:
        """The noise process of the teacher and what its network predicts.

        Raises:
            UserError: a process its stock pipeline cannot step, so that no student could leave.
        """
        schedule, kind = schedule_of(self.scheduler, self.image_tokens, self.passes_sigmas)
        if issubclass(self.face, UNetFace) and not schedule.discrete:
            raise UserError(
                f"the teacher's scheduler {type(self.scheduler).__name__} stands for flow matching, which"
                f" {type(self.pipeline).__name__} cannot sample by; put the scheduler with alphas_cumprod that its"
                " network was trained with into its directory."
            )
        return schedule, kind

    # ------------------------------------------------------------------------------------------- conditions and images

    def encode(self, prompts: Sequence[str]) -> Cond:
        raise NotImplementedError

    def cut(self, prompts: Sequence[str]) -> int:
        limits = [(min(each.model_max_length, self.told_tokens), each) for each in self.tokenizers.values()]
        if not limits or not len(prompts):
            return 0
        # The one that reads furthest; another may only give the pooled text.
        limit, tokenizer = max(limits, key=lambda pair: pair[0])
        return sum(len(ids) > limit for ids in tokenizer(self.worded(prompts), truncation=False).input_ids)

    @property
    def told_tokens(self) -> float:
        """That a prompt is cut at beside the tokenizers' own limits."""
        return getattr(self.config, "max_tokens", math.inf)

    def worded(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the tokenizer is given them, with the words that a pipeline puts around each."""
        return list(prompts)

    @property
    def tokenizers(self) -> dict[str, Any]:
        """By component name."""
        names = [name for name in self.components if name.startswith("tokenizer")]
        parts = {name: getattr(self.pipeline, name, None) for name in names}
        # A processor has one for its words.
        parts = {name: getattr(part, "tokenizer", part) for name, part in parts.items()}
        return {name: part for name, part in parts.items() if callable(part)}

    def uncond(self, count: int) -> Cond:
        if self._empty is None:
            # The same in every batch.
            self._empty = self.encode_negative([self.empty_prompt])
        # Some networks flatten batch and tokens, which an expanded tensor does not let them.
        return map_cond(lambda c: c.expand(count, *c.shape[1:]).contiguous(), self._empty)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Latent:
        self._empty = None
        return super().to(device, dtype)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        pixels = images.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        return self.normalised(self.latents_of(self.vae.encode(pixels)).float())

    def latents_of(self, encoded: Any) -> Tensor:
        """The mean, not a draw: a sample's latent must not depend on when it was encoded."""
        return encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents

    def normalised(self, z: Tensor) -> Tensor:
        """The VAE's latents as x0, of about unit variance."""
        shift = getattr(self.vae.config, "shift_factor", None)
        return (z if not shift else z - shift) * self.vae.config.scaling_factor

    def denormalised(self, x0: Tensor) -> Tensor:
        """The reverse."""
        shift = getattr(self.vae.config, "shift_factor", None)
        z = x0 / self.vae.config.scaling_factor
        return z if not shift else z + shift

    def channel_statistics(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(mean, std) of each channel of the VAE's latents like (N, C, ...), ready to broadcast; None of a VAE that says
        none.
        """
        said = [getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in said:
            return None
        mean, std = (like.new_tensor(each).view(-1, *[1] * (like.ndim - 2)) for each in said)
        return mean, std

    def latent_key(self) -> str:
        return json.dumps(["mean", *described(self.vae), list(self.resolution)])

    def park_decoder(self) -> None:
        self.vae.to("cpu")

    def decode(self, x0: Tensor) -> Tensor:
        # Wherever the decoder is now. diffusers' own properties walk through all modules, a tenth of a small image's time.
        weight = next(self.vae.parameters())
        z = self.denormalised(x0.to(weight.device, weight.dtype))
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).to(x0.device)


class ByChannel(Latent):
    """A family whose VAE says mean and deviation of each channel, and no scaling."""

    scaled_by = "latents_mean and latents_std"

    def normalised(self, z: Tensor) -> Tensor:
        mean, std = self.channel_statistics(z)
        return (z - mean) / std

    def denormalised(self, x0: Tensor) -> Tensor:
        mean, std = self.channel_statistics(x0)
        return x0 * std + mean
