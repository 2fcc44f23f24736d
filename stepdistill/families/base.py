"""The contract of a family: a diffusers pipeline in, denoisers and an exported pipeline out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.card import Card
from stepdistill.denoiser import Cond, Denoiser, parameter_count
from stepdistill.errors import UserError, first_line
from stepdistill.untrusted import LOADING, check_components, check_directory, read_json


class Family:
    """Turns a diffusers pipeline into a `Denoiser` and a trained student back into a pipeline directory.

    Attributes every family sets:
        teacher: the pipeline's denoiser, or None when a fresh network is to be trained.
        shape: of one x0, without the batch: (channels, height, width) of latents or pixels, such as (4, 64, 64), or
            (2,) of points. Of any length; nothing but the family reads a meaning into it.
        resolution: (H, W) of images in pixels.
        conditions: "prompt", "class" or "none"; class_names when known.
        pipeline: the diffusers pipeline behind it, None for the toy.
        init_noises: the first states its pipeline can start from, of `sampling.InitNoise`.
        exportable: whether a student can become a pipeline directory (`export`).
        own_data: it draws x0 and classes itself (`examples`, `prompts`); a data source gives indices only.
        preview_count: x0 that make one picture of a preview, drawn at once; None = one picture for each.
    """

    name: ClassVar[str] = ""
    # The pipeline classes it serves, each the `_class_name` of a model_index.json.
    pipelines: ClassVar[tuple[str, ...]] = ()
    # What a model_index.json may name: component -> patterns of "library.Class".
    components: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    default_guidance: float = 1.0
    teacher: Denoiser | None
    shape: tuple[int, ...]
    resolution: tuple[int, int]
    conditions: str
    class_names: tuple[str, ...] | None = None
    pipeline: Any = None
    init_noises: tuple[str, ...] = ("unit",)
    # x0 is the output of an encoder, worth computing once per data set.
    latent: bool = False
    # The family's own, {} for most: of n points, and which way is better, "lower" or "higher".
    metrics: dict[str, tuple[Callable[[Callable[[int], Tensor]], float], str]]
    exportable: bool = True
    own_data: bool = False
    preview_count: int | None = None

    @classmethod
    def from_directory(cls, path: Path) -> Family:
        """The family around a saved pipeline, teacher or student. Raises UserError as `read_pipeline` does."""
        raise UserError(
            f"the family {cls.name!r} has no pipeline directories, so {path} cannot be loaded as one."
        )

    def fresh(self) -> Denoiser:
        """A network with random weights, for `student.init=random`."""
        raise UserError(
            f"student.init=random: the family {self.name!r} has no network to start from; use student.init=teacher."
        )

    def student(self, init: str, extras: Sequence[str]) -> Denoiser:
        """The network a run trains.

        init: "teacher" (a copy), "random", or a saved student directory. extras: what it is told besides x_t,
            t, cond.
        """
        if init == "random":
            student = self.fresh()
        elif init == "teacher":
            if self.teacher is None:
                raise UserError(
                    "student.init=teacher needs family.teacher; give its directory or use student.init=random."
                )
            student = self.teacher.clone()
        else:
            student = type(self).from_directory(Path(init)).teacher.clone()
        for extra in extras:
            if extra not in getattr(student.network, "extras", {}):
                raise UserError(
                    f"family.name={self.name}: its networks cannot be told the {extra!r} this method.name needs;"
                    " choose another method or family."
                )
            student.network.extras[extra]()
        return student

    def prompts(self, source: Any, indices: Sequence[int]) -> list:
        """What `encode` is given for the examples `indices` of a data source: captions, class indices,
        or anything.
        """
        listed = {"prompt": source.captions, "class": source.labels}.get(self.conditions)
        return [listed[i] for i in indices] if listed is not None else list(indices)

    def encode(self, prompts: Sequence[str] | Sequence[int]) -> Cond:
        """Captions or class indices -> condition, batch first."""
        raise NotImplementedError

    def uncond(self, count: int) -> Cond:
        """The condition that stands for none."""
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> x0 (N, *shape)."""
        raise NotImplementedError

    def examples(self, source: Any, indices: Sequence[int]) -> Tensor:
        """x0 of the images `indices` of a data source."""
        return self.encode_images(torch.from_numpy(source.images(indices)).permute(0, 3, 1, 2))

    def latent_key(self) -> str:
        """Names the encoder and its weights, for caches of x0."""
        raise NotImplementedError

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (N, *shape) -> images in about [0, 1] (N, 3, H, W); differentiable."""
        raise NotImplementedError

    def picture(self, x0: Tensor) -> np.ndarray:
        """x0 (N, *shape) as one row of images, uint8 (H, W, 3), for previews."""
        with torch.no_grad():
            images = self.decode(x0).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        return torch.cat(list(images), 2).permute(1, 2, 0).numpy()

    def modules(self) -> dict[str, nn.Module]:
        """Frozen helpers besides the denoiser (VAE, text encoder), by component name."""
        return {}

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Family:
        """Move teacher and helpers."""
        for module in (self.teacher, *self.modules().values()):
            if module is not None:
                cast(module, device, dtype)
        return self

    def parameters(self) -> dict[str, int]:
        """Parameter counts of the helpers a generated image costs, by stage."""
        return {name: parameter_count(module) for name, module in self.modules().items()}

    def export(self, student: Denoiser, directory: Path, card: Card) -> None:
        """Write a stock diffusers pipeline directory with the scheduler that samples as `card.sampling` says.

        Raises:
            UserError: there is no pipeline to export to.
        """
        raise UserError(f"the family {self.name!r} has no pipeline to export to.")


def cast(module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """`module.to(device, dtype)`, naming the dtype only where it changes: diffusers' models warn whenever it is named."""
    module.to(device)
    floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
    return module if floating == dtype else module.to(dtype)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that adds nothing until it is trained."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoids(value: Tensor, dim: int) -> Tensor:
    """Sines and cosines of 1000 value at falling frequencies, (B,) -> (B, dim): the formula stock pipelines
    embed `guidance_scale - 1` with, and, of t / 1000, the one UNets embed their time with.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = 1000 * value.float()[:, None] * frequencies.to(value.device)[None]
    return torch.cat((angles.sin(), angles.cos()), 1)


# What of a diffusers UNet held as `unet` comes after its middle block.
BEHIND_MIDDLE = ("unet.up_blocks", "unet.conv_norm_out", "unet.conv_out")


def unet_blocks(unet: nn.Module) -> dict[str, int]:
    """Down, middle and up blocks of a diffusers UNet held as `unet`, in forward order, name -> channels."""
    widths = list(unet.config.block_out_channels)
    down = {f"unet.down_blocks.{i}": width for i, width in enumerate(widths)}
    up = {f"unet.up_blocks.{i}": width for i, width in enumerate(reversed(widths))}
    return down | {"unet.mid_block": widths[-1]} | up


def read_index(path: Path) -> dict[str, Any]:
    """model_index.json of a pipeline directory, with a clear sentence when it is not one."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory of a diffusers pipeline.")
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{path} is not a diffusers pipeline directory: it has no model_index.json.")
    content = read_json(index)
    # A list here would name a file of code.
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise UserError(
            f"{index} is damaged: not a JSON object naming a pipeline class; fetch or export it again."
        )
    return content


def read_pipeline(path: Path, family: type[Family], **components: Any) -> Any:
    """The stock pipeline in a directory or behind a hub id, float32, from safetensors only.

    components: those that are not to be loaded, as the pipeline's constructor takes them.

    Raises:
        UserError: there is none, it cannot be loaded, or it names code or classes that `family` does not know.
    """
    from diffusers import DiffusionPipeline

    text = str(path)
    try:
        if not path.exists() and not text.startswith((".", "/", "~")) and text.count("/") == 1:
            _check_index(path, DiffusionPipeline.load_config(text), family, components)
            path = Path(DiffusionPipeline.download(text, use_safetensors=True, **components))
        _check_index(path / "model_index.json", read_index(path), family, components)
        check_directory(path)
        return DiffusionPipeline.from_pretrained(
            str(path), dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **components
        )
    except LOADING as error:
        raise UserError(f"the pipeline at {text} cannot be loaded: {first_line(error)}") from None


def _check_index(where: Path, index: Any, family: type[Family], left_out: Iterable[str]) -> None:
    name = index.get("_class_name")
    if name not in family.pipelines:
        raise UserError(
            f"{where}: a {name} is none of the pipelines that the family {family.name!r} serves,"
            f" {', '.join(family.pipelines) or 'which are none'}; choose another directory or family."
        )
    check_components(where, index, family.components, tuple(left_out))
