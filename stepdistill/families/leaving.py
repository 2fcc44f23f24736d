"""How a student of a family of latents leaves: its stock pipeline, adapters of their own, and how those are called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from stepdistill.card import Card
from stepdistill.denoiser import Denoiser
from stepdistill.families.encoders import TextParts
from stepdistill.families.faces import Face
from stepdistill.families.schedulers import few_step_scheduler, flow_settings, of_kind
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, Schedule

if TYPE_CHECKING:
    from stepdistill.lora import LoRA


class Leaving(TextParts):
    """A family whose students leave as the teacher's pipeline around another network and scheduler.

    Attributes:
        face: of the denoiser. scheduler: the teacher's. schedule: the noise process the networks are spoken to in.
        passes_sigmas: the pipeline gives its flow scheduler even times of its own, so a scheduler's shift says all;
            otherwise the scheduler makes them from its own smallest time. takes_sigmas: its call takes other ones.
        student_settings: what a pipeline around a student is made with, beyond its parts.
    """

    face: ClassVar[type[Face]]
    passes_sigmas: ClassVar[bool] = True
    takes_sigmas: ClassVar[bool] = True
    student_settings: ClassVar[Mapping[str, Any]] = {}
    scheduler: Any
    schedule: Schedule

    def few_step_scheduler(self, sampling: Sampling) -> Any:
        """The stock scheduler a student leaves with."""
        return few_step_scheduler(self.scheduler, sampling, self.schedule, self.passes_sigmas)

    def student_scheduler(self, card: Card, kind: str) -> Any:
        many = card.kind == "teacher"
        return of_kind(self.scheduler if many else self.few_step_scheduler(card.sampling), kind)

    def export(self, student: Denoiser, directory: Path, card: Card) -> None:
        self.load_text()
        network, scheduler = student.network, self.student_scheduler(card, student.kind)
        if card.kind == "teacher":
            pipeline = self.assembled(network.model, scheduler)
        else:
            settings = self.student_settings if card.sampling.guidance == "none" else {}
            pipeline = self.assembled(network.leaving(card.sampling.inputs), scheduler, **settings)
        for part in pipeline.components.values():
            _forget_calls(part)
        pipeline.save_pretrained(directory, safe_serialization=True)

    @property
    def no_lora_file(self) -> str:
        stock = type(self.pipeline)
        if hasattr(stock, "save_lora_weights"):
            return ""
        return f"{stock.__name__} has no `load_lora_weights`, so adapters leave merged into the weights only."

    def lora_file(self, student: LoRA, directory: Path) -> Path | None:
        if self.no_lora_file:
            return None
        inner = self.face.inner
        layers = {f"{inner}_lora_layers": student.layers(inner)}
        type(self.pipeline).save_lora_weights(directory, safe_serialization=True, **layers)
        return directory / "pytorch_lora_weights.safetensors"

    def assembled(self, model: nn.Module, scheduler: Any, **settings: Any) -> Any:
        """The stock pipeline around another network and scheduler; settings: further arguments that it is made with."""
        stock = self.pipeline
        told = (
            dict(stock.config)
            | stock.components
            | {self.face.inner: model, "scheduler": scheduler}
            | settings
        )
        names = inspect.signature(type(stock).__init__).parameters
        return type(stock)(**{name: value for name, value in told.items() if name in names})

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        height, width = self.resolution
        return {"guidance_scale": guidance_scale, "height": height, "width": width}

    def stock_load(self) -> dict[str, Any]:
        # Components that a pipeline may lack but that its class does not count as optional.
        lenient = getattr(type(self.pipeline), "_optional_components", ())
        lacking = (name for name in self.optional if getattr(self.pipeline, name, None) is None)
        return {name: None for name in lacking if name not in lenient}

    def stock_steps(self, sampling: Sampling, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if not sampling.steps:
            return {}, {}
        if not isinstance(self.schedule, Flow):
            own = steps == 2 and sampling.middle_time and sampling.rule == "renoise"
            times = [int(t) for t in sampling.grid(self.schedule, steps)]
            return {}, {"timesteps": times} if own else {}
        left, _ = flow_settings(self.schedule, sampling, max(sampling.steps), self.passes_sigmas)
        wanted, sigmas = flow_settings(self.schedule, sampling, steps, self.passes_sigmas)
        return {key: value for key, value in wanted.items() if left[key] != value}, (
            {"sigmas": sigmas} if sigmas else {}
        )

    def beyond_stock(self, sampling: Sampling) -> str:
        if not isinstance(self.schedule, Flow):
            called = inspect.signature(type(self.pipeline).__call__).parameters
            if any("timesteps" in self.stock_steps(sampling, n)[1] for n in sampling.steps) and (
                "timesteps" not in called
            ):
                return f"{type(self.pipeline).__name__} takes a number of steps alone, and this student's two are not even."
            return ""
        if sampling.first_rho:
            return f"Stock flow pipelines start from noise alone, and this student at rho = {sampling.first_rho:g}."
        if not self.takes_sigmas and any(
            "sigmas" in self.stock_steps(sampling, n)[1] for n in sampling.steps
        ):
            return (
                f"{self.pipelines[0]} takes a number of steps alone, and this student's times are not even."
            )
        return ""


def _forget_calls(part: Any) -> None:
    """Of a tokenizer, which would save how it was last asked to pad and cut: a file must not depend on that."""
    backend = getattr(getattr(part, "tokenizer", part), "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
