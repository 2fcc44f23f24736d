"""Frozen networks side by side, whose features of images are matched in distribution (stepdistill/methods/rdm.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepdistill.config import build
from stepdistill.errors import UserError
from stepdistill.eyes import EYES, Eye
from stepdistill.methods.base import addressed
from stepdistill.registry import made, resolve

WHERE = "method.encoders"


@dataclass(frozen=True)
class Encoder:
    """One frozen network: a name in eyes.EYES, or with --allow-code my_module:MyEye, its arguments and its weight."""

    name: str = "clip"
    arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, got {self.weight:g}.")


class Encoders:
    """Several of them.

    Args:
        sections: of each its name, arguments and weight, as a recipe's `method.encoders` lists them.
        prompt_weight: of a prompt's embedding beside the features; 0 = images alone.

    Raises:
        UserError: there are none, or a section is none of an encoder.
    """

    def __init__(self, sections: Sequence[Mapping[str, Any]], prompt_weight: float = 0.0):
        if not sections:
            raise UserError(f"{WHERE} is empty; give at least one, {{name: clip}} say.")
        self.prompt_weight = prompt_weight
        self.encoders = [build(Encoder, each, f"{WHERE}.{i}") for i, each in enumerate(sections)]
        self._classes = [
            resolve(each.name, EYES, "eye", where=f"{WHERE}.{i}.name") for i, each in enumerate(self.encoders)
        ]
        self._eyes: list[Eye] = []

    @property
    def eyes(self) -> list[Eye]:
        """Made when they are first asked for. Raises UserError for those that cannot be."""
        if not self._eyes:
            eyes = []
            for i, (found, each) in enumerate(zip(self._classes, self.encoders, strict=True)):
                with addressed(f"{WHERE}.{i}"):
                    eyes.append(made(found, each.arguments, each.name))
            if self.prompt_weight and not any(eye.prompt_width for eye in eyes):
                raise UserError(
                    f"method.prompt_weight={self.prompt_weight:g}: none of {WHERE} embeds prompts; set it to 0, or add"
                    " {name: clip}."
                )
            self._eyes = eyes
        return self._eyes

    @property
    def weights(self) -> list[float]:
        return [each.weight for each in self.encoders]

    @property
    def widths(self) -> list[int]:
        """Of what `features` gives by each."""
        told = self.prompt_weight > 0
        return [sum(eye.widths) + told * eye.prompt_width for eye in self.eyes]

    @property
    def directories(self) -> tuple[str, ...]:
        """Where weights of theirs lie."""
        return tuple(eye.directory for eye in self.eyes if eye.directory)

    @property
    def reads_captions(self) -> bool:
        """Whether prompts must be texts."""
        return self.prompt_weight > 0 and any(each.reads_captions for each in self._classes)

    def features(self, images: Tensor, prompts: Sequence[Any] | None) -> list[Tensor]:
        """By encoder, (B, width), with gradient: means over places of each of its layers, in a row, and the prompts'
        embeddings, weighed.
        """
        found = []
        for eye in self.eyes:
            parts = [layer.float().mean(1) for layer in eye.features(images)]
            if self.prompt_weight and eye.prompt_width:
                if prompts is None:
                    raise UserError(
                        "method.prompt_weight needs captions, and this data has none; set it to 0."
                    )
                told = eye.prompts(prompts, images.device)
                parts.append(self.prompt_weight * told.to(parts[0]))
            found.append(torch.cat(parts, 1))
        return found
