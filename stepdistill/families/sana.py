"""SANA and SANA-Sprint: flow matching on the latents of a deep-compression autoencoder, told Gemma's states."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.denoiser import Cond
from stepdistill.families.depth import ends_late
from stepdistill.families.faces import TransformerFace
from stepdistill.families.latent import Latent, LatentConfig
from stepdistill.families.reading import GEMMA_TOKENIZERS
from stepdistill.sampling import Sampling
from stepdistill.schedule import TrigFlow
from stepdistill.shift import even

# The part of a first state that is noise from where on it counts as noise alone: sCM's of rho = 80 does.
NOISE_ALONE = 0.999


class SanaTransformer(TransformerFace):
    """cond: prompt (B, L, 2304) of Gemma and its mask (B, L)."""

    prunable: ClassVar = {"transformer_blocks": "num_layers"}

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.at_time(x_t, 1000 * self.transformer.config.timestep_scale * t, cond)

    def at_time(self, x_t: Tensor, time: Tensor, cond: Cond, **arguments: Tensor) -> Tensor:
        """The transformer's output at `time` (B,) in its own unit; of twice the channels it is the first half."""
        model = self.transformer
        raw = model(
            x_t.to(model.dtype),
            encoder_hidden_states=cond["prompt"].to(model.dtype),
            encoder_attention_mask=cond["mask"],
            timestep=time.to(x_t.device, torch.float32),
            return_dict=False,
            **arguments,
        )[0]
        return raw[:, : x_t.shape[1]]


class SprintTransformer(SanaTransformer):
    """cond: beside prompt and mask guidance (B,), the scale g it is told; its time is the flow's, not 1000 times it."""

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return super().extras | {"guidance": lambda: None}

    @ends_late
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """guidance: (B,) the scale that is told in place of the condition's."""
        scale = guidance if guidance is not None else cond["guidance"]
        scale = scale.to(x_t.device, self.transformer.dtype) * self.transformer.config.guidance_embeds_scale
        return self.at_time(x_t, t, cond, guidance=scale)


class Sana(Latent):
    """SanaPipeline. Its prompts follow an instruction to Gemma, of whose tokens the last `max_tokens` are told; negative
    ones and the empty one do not.
    """

    @dataclass
    class Config(LatentConfig):
        """As `LatentConfig`.

        Attributes:
            max_tokens: of the prompt.
            instruction: put the pipeline's own instruction before prompts, as its call does by default.
        """

        max_tokens: int = 300
        instruction: bool = True

    name = "sana"
    pipelines = ("SanaPipeline",)
    face = SanaTransformer
    default_guidance = 4.5
    passes_sigmas = False
    sides = 32
    kept = ("max_tokens", "instruction")
    components: ClassVar = {
        "vae": ("diffusers.AutoencoderDC",),
        "text_encoder": ("transformers.Gemma2Model", "transformers.Gemma2ForCausalLM"),
        "tokenizer": GEMMA_TOKENIZERS,
        "transformer": ("diffusers.SanaTransformer2DModel",),
        "scheduler": ("diffusers.*Scheduler",),
    }

    @property
    def instruction(self) -> list[str] | None:
        """What comes before a prompt, a line each."""
        call = inspect.signature(type(self.pipeline).__call__).parameters
        return call["complex_human_instruction"].default if self.config.instruction else None

    def encode(self, prompts: Sequence[str]) -> Cond:
        return self._encode(prompts, self.instruction)

    def encode_negative(self, prompts: Sequence[str]) -> Cond:
        return self._encode(prompts, None)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> Cond:
        # In the order of the arguments, whose names the two pipelines share: without an unconditional one.
        told = (
            {"do_classifier_free_guidance": False} if type(self.pipeline).__name__ == "SanaPipeline" else {}
        )
        states, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.config.max_tokens,
            complex_human_instruction=instruction, **told,
        )[:2]  # fmt: skip
        return {"prompt": states, "mask": mask}

    def latents_of(self, encoded: Any) -> Tensor:
        return encoded.latent

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        told = {"max_sequence_length": self.config.max_tokens, "use_resolution_binning": False}
        if not self.config.instruction:
            told["complex_human_instruction"] = None
        return super().stock_call(guidance_scale) | told


class SanaSprint(Sana):
    """SanaSprintPipeline, a few-step model with embedded guidance, whose grid is even in TrigFlow's angle. Its state is
    sigma_data times that of TrigFlow(1), which it is spoken to in here.
    """

    @dataclass
    class Config(Sana.Config):
        """As `Sana.Config`.

        Attributes:
            embedded_guidance: what the network is told where no scale is asked for.
        """

        embedded_guidance: float = 4.5

    name = "sana_sprint"
    pipelines = ("SanaSprintPipeline",)
    image_to_image = "SanaSprintImg2ImgPipeline"
    face = SprintTransformer
    many_steps = Sampling(steps=(), rule="renoise", guidance="input")
    kept = (*Sana.kept, "embedded_guidance")

    def set_pipeline(self, pipeline: Any) -> None:
        super().set_pipeline(pipeline)
        self.schedule = TrigFlow(1.0)
        self.teacher = self.teacher.under(self.schedule).eval()

    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> Cond:
        scale = torch.full((len(prompts),), self.config.embedded_guidance, device=self.device)
        return super()._encode(prompts, instruction) | {"guidance": scale}

    def few_step_scheduler(self, sampling: Sampling) -> Any:
        return type(self.scheduler).from_config(self.scheduler.config)

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        """With the embedded scale: the pipeline has no other guidance."""
        return super().stock_call(self.config.embedded_guidance)

    def stock_steps(self, sampling: Sampling, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        # Its own are 1.57080, a little beyond a quarter turn, and 1.3, which two steps alone may have.
        first, *later = sampling.grid(self.schedule, steps)
        return {}, {"max_timesteps": first, "intermediate_timesteps": later[0] if steps == 2 else None}

    def beyond_stock(self, sampling: Sampling) -> str:
        counts = sampling.steps or (1,)
        if sampling.rule == "ode" and max(counts) > 1:
            return "SanaSprintPipeline renoises between its steps, and this student follows the ODE."
        grids = [sampling.grid(self.schedule, steps) for steps in counts]
        if math.sin(grids[0][0]) < NOISE_ALONE:
            return f"SanaSprintPipeline starts from noise alone, and this student at rho = {sampling.first_rho:g}."
        if not all(even(grid) for grid in grids if len(grid) > 2):
            return "SanaSprintPipeline lists even angles for more than two steps, and this student's are not."
        return ""
