"""Pictures of a run, with fixed prompts and seeds: student, teacher, and what the critic believes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from stepdistill.denoiser import Denoiser
from stepdistill.errors import atomic_write
from stepdistill.noise import SampleNoise
from stepdistill.sampling import ImageSampler

if TYPE_CHECKING:
    from training.trainer import Trainer

TEACHER_STEPS = 50


def draw_preview(trainer: Trainer) -> Path:
    """One PNG: a row per student step count, then the teacher, then the fake score's x0 of noised images, and
    the health panel as it was at the last line of the log.

    Prompts are the first of the data, seeds 0, 1, 2, ... The teacher's row is drawn once per run.
    """
    family, sampler = trainer.family, trainer.sampler()
    points = len(family.shape) == 1
    count, chunk = (1024, 1024) if points else (trainer.run.preview_count, 16)
    told, seeds = preview_conditions(trainer, count), range(count)
    counts = sorted(sampler.steps or (TEACHER_STEPS,))
    drawn = [sampler.x0(told, seeds, steps=steps, chunk=chunk) for steps in counts]
    rows = [
        (f"{sampler.kind}, {steps} step{'s' * (steps > 1)}", family.picture(x0))
        for steps, x0 in zip(counts, drawn, strict=True)
    ]
    if trainer.method.needs_teacher:
        if trainer.preview_teacher is None:
            card = _teacher_card(trainer)
            teacher = ImageSampler(family, family.teacher, Path("teacher"), card, trainer.device)
            x0 = teacher.x0(told, seeds, steps=TEACHER_STEPS, chunk=chunk)
            trainer.preview_teacher = family.picture(x0)
        rows.append((f"teacher, {TEACHER_STEPS} steps", trainer.preview_teacher))
    for name, module in trainer.raw.items():
        if name.split("/")[-1] == "fake_score":
            believed = family.picture(_believed(trainer, module, drawn[0], told))
            rows.append((f"{name}: x0 of the student's images at half the noise", believed))
    path = trainer.directory.previews / f"{trainer.offset + trainer.step:07d}.png"
    with atomic_write(path) as temporary:
        grid(rows, trainer.health.lines()).save(temporary, format="PNG")
    return path


def preview_conditions(trainer: Trainer, count: int) -> list[Any]:
    """The same captions or labels in every preview of a run."""
    family, source = trainer.family, trainer.source
    if family.conditions == "prompt":
        return [source.captions[i % source.size] for i in range(count)]
    return [i % len(family.class_names) if family.class_names else 0 for i in range(count)]


def _teacher_card(trainer: Trainer) -> dict[str, Any]:
    return {"kind": "teacher", "guidance_scale": getattr(trainer.method.config, "guidance_scale", 1.0)}


@torch.no_grad()
def _believed(trainer: Trainer, fake_score: Denoiser, x0: torch.Tensor, told: list[Any]) -> torch.Tensor:
    schedule, family = trainer.family.schedule, trainer.family
    noise = SampleNoise(range(len(x0)), trainer.run.seed, phase="preview")
    t = schedule.t_of_rho(torch.ones(len(x0), dtype=torch.float64)).to(x0.device)
    x_t = schedule.add_noise(x0, noise.randn(*family.shape).to(x0.device), t)
    cond = family.encode(told)
    return fake_score(x_t, t, cond.to(x0.device) if cond is not None else None).x0


def grid(rows: list[tuple[str, np.ndarray]], notes: Sequence[str] = ()) -> Image.Image:
    """Rows of pictures with a line of text above each, and lines of text below them all."""
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
