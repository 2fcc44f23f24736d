"""One model drawing one image: what the sampler is asked, what it took, and whether its networks overflowed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from app.request import NumericalFailure, Request
from app.result import Shot

if TYPE_CHECKING:
    from app.loading import Models


def draw(
    models: Models,
    model: str,
    request: Request,
    steps: int | None,
    on_step: Callable[[int, int], None] | None = None,
) -> Shot:
    """The image of `model` ("student" or "teacher") for a validated request.

    Args:
        steps: network passes; None is the sampler's own default.
        on_step: called with the steps done and their number after each; what it raises ends the drawing.

    Raises:
        NumericalFailure: a network gave NaN or infinity.
    """
    sampler, finite = models.samplers[model], models.finite[model]
    guidance = None if sampler.guidance_free else request.guidance_scale
    negative = request.negative_prompt if not sampler.guidance_free else ""
    prompt: Any = request.prompt
    if models.limits.conditions == "class" and models.limits.class_names:
        prompt = models.limits.class_names.index(prompt)
    spent: dict[str, float] = {}
    finite.reset()
    images = sampler(
        [prompt],
        [request.seed],
        steps=steps,
        guidance_scale=guidance,
        negative_prompts=[negative] if negative else None,
        # The size the networks are run at; a larger one would be filled up with copies.
        chunk=1,
        timings=spent,
        on_step=on_step,
    )
    if not finite.holds():
        raise NumericalFailure(
            f"{sampler.name} gave NaN or infinite values in {models.dtype}; try --dtype float32."
        )
    return Shot(
        model=model,
        name=sampler.name,
        image=np.ascontiguousarray(images[0].permute(1, 2, 0).cpu().numpy()),
        steps=steps or sampler.default_steps,
        guidance_scale=float(sampler.default_guidance if guidance is None else guidance),
        text=spent.get("text", 0.0),
        denoise=spent.get("denoise", 0.0),
        decode=spent.get("decode", 0.0),
    )


class Finite:
    """Watches the outputs of a sampler's networks for NaN and infinity.

    The sampler returns uint8, where NaN has become black; so each network's output is looked at. The answer
    stays on the device until the image is there: asking after every step would stop the GPU each time.
    """

    def __init__(self, sampler: Any) -> None:
        self._stack = ExitStack()
        self._bad: torch.Tensor | None = None
        pipeline = sampler.pipeline
        for network in (sampler.denoiser.network, getattr(pipeline, "text_encoder", None)):
            if isinstance(network, torch.nn.Module):
                self._stack.callback(network.register_forward_hook(self._look).remove)
        decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
        if isinstance(decoder, torch.nn.Module):
            self._stack.callback(decoder.register_forward_hook(self._look).remove)

    def reset(self) -> None:
        self._bad = None

    def holds(self) -> bool:
        """Whether everything since `reset` was finite."""
        return self._bad is None or not bool(self._bad)

    def _look(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) or hasattr(output, "to_tuple") else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            bad = ~torch.isfinite(first).all()
            self._bad = bad if self._bad is None else self._bad | bad
