"""Several students drawn with as one: what `routing.merge` puts side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from stepdistill.card import Card
from stepdistill.drawer import Drawer, OnStep
from stepdistill.drawing import Sampler, refuse_lengths
from stepdistill.routing import router


class Students(Sampler):
    """K students as one `Sampler`: every prompt or class is drawn by the student it belongs to
    (`stepdistill.routing`), and costs what one student costs.

    What all have in common (steps, resolution, conditions, ...) is read from the first.
    """

    def __init__(self, path: Path, card: Card, parts: Sequence[Sampler]):
        first = parts[0]
        self.__dict__.update(vars(first))
        self.path, self.card, self.name, self.parts = path, card, card.name or path.name, tuple(parts)
        self.parameters = first.parameters | {"denoiser": sum(part.parameters["denoiser"] for part in parts)}

    @cached_property
    def route(self) -> Callable[[Sequence], list[int]]:
        """Prompts or class indices -> which student draws each, from 0."""
        return router(self.card.routing)

    def trace(self) -> Students:
        """As `Sampler.trace`."""
        for part in self.parts:
            part.trace()
        return self

    def draw(
        self, drawer: Drawer, prompts: Sequence, seeds: Sequence[int], on_step: OnStep | None = None,
        negatives: Sequence[str] | None = None, timings: dict[str, float] | None = None, images: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Sampler.draw`: each image that of its own student alone."""

        def own(part: Sampler, rows: list[int]) -> Tensor:
            theirs = [negatives[i] for i in rows] if negatives else None
            wanted = [prompts[i] for i in rows], [seeds[i] for i in rows]
            return part.draw(drawer, *wanted, on_step, theirs, timings, _rows(images, rows))

        return self._gathered(prompts, seeds, own)

    def draw_x0(
        self, drawer: Drawer, prompts: Sequence, seeds: Sequence[int], on_step: OnStep | None = None,
        images: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Sampler.draw_x0`."""

        def own(part: Sampler, rows: list[int]) -> Tensor:
            wanted = [prompts[i] for i in rows], [seeds[i] for i in rows]
            return part.draw_x0(drawer, *wanted, on_step, _rows(images, rows))

        return self._gathered(prompts, seeds, own)

    def _gathered(self, prompts: Sequence, seeds: Sequence[int], draw: Callable[..., Tensor]) -> Tensor:
        refuse_lengths(prompts, seeds)
        if not len(prompts):
            return draw(self.parts[0], [])
        chosen, out = np.array(self.route(prompts)), None
        for k, part in enumerate(self.parts):
            rows = np.flatnonzero(chosen == k).tolist()
            if not rows:
                continue
            images = draw(part, rows)
            out = images.new_empty((len(prompts), *images.shape[1:])) if out is None else out
            out[rows] = images
        return out


def _rows(images: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if images is None else images[rows]
