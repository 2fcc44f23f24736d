"""Pixel-space UNet2DModel, class-conditional or not.

Two layouts are read: `ConsistencyModelPipeline` (EDM scalings; takes labels) and `DDPMPipeline` /
`DDIMPipeline` (a DDPM table, no labels). A fresh network is made in the first, because it is the stock
pipeline that takes class labels and steps a few-step
student: teacher and student then differ in nothing but their weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.card import Card
from stepdistill.config import build
from stepdistill.denoiser import Cond, Denoiser
from stepdistill.errors import UserError, first_line
from stepdistill.families.base import Family
from stepdistill.families.depth import second_half_at
from stepdistill.families.faces import BEHIND_MIDDLE, Face, sinusoids, unet_blocks, zero_linear
from stepdistill.families.labels import labels_of
from stepdistill.families.reading import read_pipeline, understood
from stepdistill.families.schedulers import few_step_scheduler, of_kind, schedule_of
from stepdistill.families.unets import check_unet, drop_variance
from stepdistill.schedule import EDM, expand
from stepdistill.untrusted import LOADING

# Beside the pipeline, the layer that tells a two-time student its end.
END = "end.safetensors"


class PixelUNet(Face):
    """The face of a UNet2DModel; cond is class indices (B,) int64, of which the last may mean "no class", or None.

    With `sigma_data` the network is preconditioned as `CMStochasticIterativeScheduler` does it (Song et al.
    2023, App. C): x0 = c_skip x_t + c_out unet(c_in x_t, 250 log sigma), and x0 = x_t at sigma_min exactly.
    """

    inner, middle, behind_middle = "unet", "unet.mid_block", BEHIND_MIDDLE
    # Whether an end is told to the second half in the place of t (`second_half_at`), not embedded.
    end_by_depth = False

    def __init__(self, unet: nn.Module, sigma_data: float | None = None, sigma_min: float = 0.002):
        super().__init__(unet)
        self.sigma_data, self.sigma_min = sigma_data, sigma_min
        self.end: nn.Linear | None = None

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return {"end": self.add_end, "end_by_depth": self.add_end_by_depth}

    def add_end_by_depth(self) -> None:
        self.end_by_depth = True

    def add_end(self) -> None:
        """Let the network be told where its jump ends, in addition to its time embedding; nothing changes
        at first.
        """
        if self.end is None:
            self.end = zero_linear(256, self.unet.time_embedding.linear_2.out_features)

    @property
    def blocks(self) -> dict[str, int]:
        return unet_blocks(self.unet)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, end: Tensor | None = None) -> Tensor:
        """end: (B,) the time a two-time student jumps to."""
        if self.sigma_data is None:
            return self._raw(x_t, t, cond, end)
        data, sigma = self.sigma_data, t.double()
        norm = (sigma**2 + data**2).sqrt()
        c_skip = expand(data**2 / ((sigma - self.sigma_min) ** 2 + data**2), x_t)
        c_out, c_in = expand((sigma - self.sigma_min) * data / norm, x_t), expand(1 / norm, x_t)
        noise = 250 * sigma.clamp(min=1e-20).log()
        if end is not None and self.end_by_depth:
            end = 250 * end.double().clamp(min=self.sigma_min).log()
        elif end is not None:
            # Smooth at 0, where jumps end.
            end = 1000 * end / (1 + end)
        return c_skip * x_t + c_out * self._raw(c_in * x_t, noise, cond, end).to(x_t.dtype)

    def _raw(self, x: Tensor, label: Tensor, cond: Cond, end: Tensor | None) -> Tensor:
        """The UNet's output; label and end in the units of its time embedding."""
        with contextlib.ExitStack() as hooked:
            label = label.to(x.device, torch.float32)
            if end is not None and self.end_by_depth:
                hooked.enter_context(second_half_at(self.unet, label, end.to(label)))
            elif end is not None:
                embedded = self.end(sinusoids(end.to(x.device) / 1000, 256).to(x.dtype))
                hook = self.unet.time_embedding.register_forward_hook(
                    lambda _m, _x, out: out + embedded.to(out)
                )
                hooked.callback(hook.remove)
            dtype = self.unet.dtype
            return self.unet(x.to(dtype), label, class_labels=cond).sample


class Pixel(Family):
    """x0 is the image itself in [-1, 1]."""

    name = "pixel"
    pipelines = ("ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline")
    components: ClassVar = {"unet": ("diffusers.UNet2DModel",), "scheduler": ("diffusers.*Scheduler",)}

    @dataclass
    class Config:
        # Pipeline directory or hub id.
        teacher: str = ""
        # Only for student.init=random: the UNet2DModel's configuration; num_class_embeds counts the classes,
        # without the extra "no class" entry, which is added where null_class says so.
        unet: dict[str, Any] = field(default_factory=dict)
        # The same beside a teacher: a smaller student.
        student_unet: dict[str, Any] = field(default_factory=dict)
        class_names: tuple[str, ...] = ()
        # The last of a class-conditional network's embeddings means "no class"; without one there is no guidance.
        null_class: bool = True

    def __init__(self, config: Pixel.Config):
        self.config, self.metrics, self.null_class = config, {}, config.null_class
        if config.unet:
            self.teacher, self.schedule, self.kind, self.pipeline = None, EDM(), "x0", None
            self._describe(
                config.unet.get("sample_size", 32),
                config.unet.get("num_class_embeds"),
                config.unet.get("in_channels", 3),
            )
        elif config.teacher:
            pipeline = read_pipeline(Path(config.teacher), type(self))
            with understood(config.teacher):
                self._set_pipeline(pipeline)
        else:
            raise UserError(
                "family.teacher is missing; give a pipeline directory, or family.unet to train a fresh network."
            )
        self.class_names = tuple(config.class_names) or self.class_names

    @classmethod
    def from_directory(
        cls, path: Path, settings: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> Pixel:
        family = cls(build(cls.Config, dict(settings or {}) | {"teacher": str(path)}, "family"))
        if (path / END).is_file():
            family.teacher.network.add_end()
            try:
                family.teacher.network.end.load_state_dict(load_file(path / END))
            except UserError:
                raise
            except LOADING as error:
                raise UserError(f"{path / END} cannot be loaded: {first_line(error)}") from None
            family.teacher.requires_grad_(False)
        return family

    @property
    def settings(self) -> dict[str, Any]:
        return {"null_class": self.null_class} if self.classes else {}

    @property
    def guidable(self) -> bool:
        return not self.classes or self.null_class

    def _set_pipeline(self, pipeline: Any) -> None:
        check_unet(pipeline.unet, Path(self.config.teacher), (3, 1), {"num_class_embeds": ...})
        drop_variance(pipeline)
        self.pipeline, scheduler, unet = pipeline, pipeline.scheduler, pipeline.unet
        if type(scheduler).__name__ == "CMStochasticIterativeScheduler":
            config = scheduler.config
            self.schedule, self.kind = EDM(config.sigma_min, config.sigma_max), "x0"
            network = PixelUNet(unet, config.sigma_data, config.sigma_min)
            # Which are one under EDM.
            self.init_noises = ("unit", "sigma")
        else:
            self.schedule, self.kind = schedule_of(scheduler)
            network = PixelUNet(unet)
        self.teacher = Denoiser(network, self.kind, self.schedule).eval().requires_grad_(False)
        embeds, names = unet.config.num_class_embeds, self.config.class_names
        if embeds and len(names) == embeds:
            self.null_class = False
        classes = embeds - self.null_class if embeds else None
        self._describe(unet.config.sample_size, classes, unet.config.in_channels)

    def _describe(self, size: int | Sequence[int] | None, classes: int | None, channels: int) -> None:
        if size is None:
            raise UserError(
                f"{self.config.teacher}: sample_size in unet/config.json is null; give it the side of the network's"
                " images in pixels."
            )
        self.resolution = (size, size) if isinstance(size, int) else tuple(size)
        self.shape = (channels, *self.resolution)
        self.classes = classes
        self.conditions = "class" if classes else "none"
        self.class_names = tuple(str(i) for i in range(classes)) if classes else None

    def fresh(self) -> Denoiser:
        from diffusers import UNet2DModel

        settings = dict(self.config.unet or self.config.student_unet)
        if not settings:
            raise UserError(
                "student.init=random needs family.unet, the configuration of the UNet2DModel to train,"
                " or family.student_unet beside a teacher."
            )
        if self.classes:
            settings["num_class_embeds"] = self.classes + self.null_class
        try:
            unet = UNet2DModel.from_config(settings)
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"family.unet is no valid UNet2DModel configuration: {first_line(error)}"
            ) from None
        sigma_data = self.teacher.network.sigma_data if self.teacher is not None else 0.5
        return Denoiser(PixelUNet(unet, sigma_data), self.kind, self.schedule)

    def encode(self, prompts: Sequence[int]) -> Cond:
        if self.conditions == "none":
            return None
        others = (
            ""
            if not self.guidable
            else (
                f"; the last of {self.classes + 1} embeddings is taken to mean no class, and is one itself with"
                " family.null_class=false"
            )
        )
        return labels_of(prompts, self.classes, others)

    def uncond(self, count: int) -> Cond:
        return torch.full((count,), self.classes) if self.classes and self.guidable else None

    def encode_images(self, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        # Grey as ITU-R BT.601 weighs it, and Pillow does.
        weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device)[:, None, None]
        return (pixels * weights).sum(1, keepdim=True) if self.shape[0] == 1 else pixels

    def decode(self, x0: Tensor) -> Tensor:
        return (x0 / 2 + 0.5).expand(-1, 3, -1, -1)

    def export(self, student: Denoiser, directory: Path, card: Card) -> None:
        from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMPipeline

        network = student.network
        if network.sigma_data is not None:
            scheduler = CMStochasticIterativeScheduler(
                num_train_timesteps=40,
                sigma_min=self.schedule.t_min,
                sigma_max=min(card.sampling.first_rho or self.schedule.t_max, self.schedule.t_max),
                sigma_data=network.sigma_data,
            )
            pipeline = ConsistencyModelPipeline(network.unet, scheduler)
        else:
            stock = self.pipeline.scheduler
            scheduler = stock if card.kind == "teacher" else few_step_scheduler(stock, card.sampling)
            scheduler = of_kind(scheduler, student.kind)
            pipeline = DDPMPipeline(network.unet, scheduler)
        pipeline.save_pretrained(directory, safe_serialization=True)
        # Stock UNets have no place for it.
        if network.end is not None:
            save_file(network.end.state_dict(), directory / END)
