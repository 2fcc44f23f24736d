"""DiT: a class-conditional transformer on 2x2 patches of latents (ImageNet's 1000 classes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace, without_variance
from stepdistill.families.labels import labels_of
from stepdistill.families.latent import Latent


class DiTTransformer(TransformerFace):
    """cond: class indices (B,) int64, the last one meaning "no class"."""

    tail = ("norm_out", "proj_out_1", "proj_out_2")
    prunable: ClassVar = {"transformer_blocks": "num_layers"}
    called_alone = ("transformer_blocks.0.norm1.emb",)

    def fixed(self, stack: str) -> dict[int, str]:
        return {0: "the first block embeds time and class for the output layer as well"}

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raw = self.transformer(
            x_t.to(self.transformer.dtype),
            timestep=t.to(x_t.device, torch.float32),
            class_labels=cond.to(x_t.device),
            return_dict=False,
        )[0]
        return without_variance(raw, x_t)


class DiT(Latent):
    """DiTPipeline, which draws squares of its transformer's own size alone and never scales its first state. Its call
    takes class 1000 for none, so with other than 1000 classes it cannot guide, though we can.
    """

    name = "dit"
    pipelines = ("DiTPipeline",)
    face = DiTTransformer
    default_guidance = 4.0
    text_parts = ()
    conditions = "class"
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny"),
        # As the published ones call it.
        "transformer": ("diffusers.DiTTransformer2DModel", "diffusers.Transformer2DModel"),
        "scheduler": ("diffusers.*Scheduler",),
    }
    plain = ("id2label",)

    def set_pipeline(self, pipeline: Any) -> None:
        super().set_pipeline(pipeline)
        self.classes = pipeline.transformer.config.num_embeds_ada_norm
        names: dict[int, str] = {}
        for name, number in pipeline.labels.items():
            names[number] = f"{names[number]}, {name}" if number in names else name
        self.class_names = tuple(names.get(number, str(number)) for number in range(self.classes))

    @property
    def stride(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check_size(self, model: nn.Module, size: tuple[int, int], where: str) -> None:
        side = model.config.sample_size * self.stride
        if any(asked != side for asked in size):
            raise UserError(
                f"{where}: a DiTPipeline draws images of {side} x {side} pixels alone, its transformer's sample_size;"
                " leave it out."
            )

    def encode(self, prompts: Sequence[int]) -> Cond:
        return labels_of(prompts, self.classes).to(self.device)

    def uncond(self, count: int) -> Cond:
        return torch.full((count,), self.classes, device=self.device)

    def assembled(self, model: nn.Module, scheduler: Any, **settings: Any) -> Any:
        pipeline = super().assembled(model, scheduler, **settings)
        pipeline.labels = self.pipeline.labels
        # Which the pipeline reads and does not write.
        pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(self.class_names)})
        return pipeline

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale}
