"""Pictures of a run, with fixed prompts and seeds: student, teacher, and what the critic believes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from stepdistill.denoiser import Denoiser, map_cond, unwrap
from stepdistill.drawing import Sampler, teacher_card
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.noise import SampleNoise
from training.data import Source

TEACHER_STEPS = 50
# Images the networks draw at once.
CHUNK = 16

Rows = list[tuple[str, np.ndarray]]


class Preview:
    """The pictures of one stage, with the first prompts of the data and seeds 0, 1, 2, ...

    Args:
        count: pictures in a row, unless the family says how many of its own it takes.
        seed: of the noise that the critic's row is given.
    """

    def __init__(self, method: Method, family: Family, source: Source, count: int, seed: int) -> None:
        self.method, self.family, self.seed = method, family, seed
        self.count = family.preview_count or count
        self.chunk = family.preview_count or CHUNK
        self.prompts = preview_prompts(family, source, self.count)
        # Drawn once per stage.
        self._teacher: np.ndarray | None = None

    def draw(
        self, sampler: Sampler, networks: Mapping[str, nn.Module], notes: Sequence[str] = ()
    ) -> Image.Image:
        """One picture: a row per student step count, then the teacher, then what each fake score makes of noised
        images, and `notes` below.
        """
        family, seeds = self.family, range(self.count)
        counts = sorted(sampler.steps or (TEACHER_STEPS,))
        draws = [sampler.at(steps, chunk=self.chunk) for steps in counts]
        drawn = [draw.x0(self.prompts, seeds) for draw in draws]
        rows: Rows = [(draw.label, family.picture(x0)) for draw, x0 in zip(draws, drawn, strict=True)]
        if self.method.needs_teacher:
            rows.append(
                (f"teacher, {teacher_steps(family, TEACHER_STEPS)} steps", self._teachers(sampler.device))
            )
        for name, module in networks.items():
            # Of codes it is a law, which believes no image.
            if name.split("/")[-1] == "fake_score" and isinstance(unwrap(module), Denoiser):
                believed = family.picture(self._believed(module, drawn[0]))
                rows.append((f"{name}: x0 of the student's images at half the noise", believed))
        return grid(rows, notes)

    def _teachers(self, device: torch.device) -> np.ndarray:
        if self._teacher is None:
            teacher = teacher_sampler(self.family, taught_guidance(self.method), device)
            steps = teacher_steps(self.family, TEACHER_STEPS)
            x0 = teacher.at(steps, chunk=self.chunk).x0(self.prompts, range(self.count))
            self._teacher = self.family.picture(x0)
        return self._teacher

    @torch.no_grad()
    def _believed(self, fake_score: Denoiser, x0: torch.Tensor) -> torch.Tensor:
        """The fake score's x0 of x0 (N, *shape), noised to rho = 1."""
        schedule, family, device = self.family.schedule, self.family, x0.device
        noise = SampleNoise(range(len(x0)), self.seed, phase="preview")
        t = schedule.t_of_rho(torch.ones(len(x0), dtype=torch.float64)).to(device)
        x_t = schedule.add_noise(x0, noise.randn(*family.shape).to(device), t)
        cond = map_cond(lambda c: c.to(device), family.encode(self.prompts))
        return fake_score(x_t, t, cond).x0


def taught_guidance(method: Method) -> float:
    """The scale its teacher is guided by."""
    return getattr(method.config, "guidance_scale", 1.0)


def teacher_sampler(family: Family, guidance: float, device: torch.device) -> Sampler:
    """The family's teacher, drawn with that guidance."""
    card = teacher_card(family, guidance)
    return Sampler(family, family.teacher, Path("teacher"), card, device)


def teacher_steps(family: Family, wanted: int) -> int:
    """Of the family's teacher: as many as are wanted, unless it has a number of its own, as one of codes has."""
    return max(family.many_steps.steps, default=wanted)


def preview_prompts(family: Family, source: Source, count: int) -> list[str] | list[int]:
    """The same captions or class indices in every preview of a run."""
    if family.conditions == "prompt":
        return [source.captions[i % source.size] for i in range(count)]
    return [i % len(family.class_names) if family.class_names else 0 for i in range(count)]


def grid(rows: Rows, notes: Sequence[str] = ()) -> Image.Image:
    """Rows of pictures, each uint8 (H, W, 3), with a line of text above each, and lines of text below them all."""
    width, line = max(picture.shape[1] for _, picture in rows), 14
    height = sum(line + picture.shape[0] for _, picture in rows) + line * len(notes)
    canvas = Image.new("RGB", (width, height), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for text, picture in rows:
        pen.text((2, top + 1), text, fill="black")
        canvas.paste(Image.fromarray(picture), (0, top + line))
        top += line + picture.shape[0]
    for note in notes:
        pen.text((2, top + 1), note, fill="red" if note.startswith("!") else "black")
        top += line
    return canvas
