"""One picture of what distillation gains and loses: the same prompts and noise for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.settings import Place
from stepdistill.errors import UserError, atomic_write

if TYPE_CHECKING:
    from stepdistill.drawing import Drawer, Sampler

_INK, _FAINT, _PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)
# Pixels.
_GAP, _CAPTION, _LABEL, _HEADING, _MARGIN = 12, 210, 24, 52, 20
# Least side of a shown image.
_SHOWN = 192


@dataclass(frozen=True)
class Column:
    """One pipeline at one setting, under a heading."""

    heading: str
    drawer: Drawer


def columns_of(
    teacher: Sampler, student: Sampler, *, teacher_steps: int | None = None, teacher_guidance: float | None = None,
    student_steps: Sequence[int] | None = None, before: bool = False,
) -> list[Column]:  # fmt: skip
    """Teacher | student, most steps first | with `before`, the teacher at the student's least steps. Raises UserError
    for step counts the student was not trained for.
    """
    known = student.steps or (student.default_steps,)
    counts = sorted(set(student_steps or [step for step in (1, 4) if step in known] or known), reverse=True)
    for count in counts:
        if student.steps and count not in student.steps:
            raise UserError(
                f"--student-steps {count} is not what {student.path} was trained for; it has {student.steps}."
            )
    drawers = [("teacher", teacher.at(teacher_steps, teacher_guidance, chunk=1))]
    drawers += [("student", student.at(count, chunk=1)) for count in counts]
    if before:
        drawers.append(("teacher", teacher.at(counts[-1], teacher_guidance, chunk=1)))
    return [Column(f"{who}, {d.steps} step{'s' if d.steps > 1 else ''}", d) for who, d in drawers]


def draw(
    columns: Sequence[Column], prompts: Sequence[str] | Sequence[int], seeds: Sequence[int]
) -> tuple[list[list[np.ndarray]], list[list[float]]]:
    """Images uint8 (H, W, 3) and seconds, [row][column]: one at a time, columns in turns, after a warm-up."""
    for column in columns:
        column.drawer(prompts[:1], seeds[:1])
    images: list[list[np.ndarray]] = []
    seconds: list[list[float]] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        images.append([])
        seconds.append([])
        for column in columns:
            began = time.perf_counter()
            image = column.drawer([prompt], [seed])
            seconds[-1].append(time.perf_counter() - began)
            images[-1].append(image[0].permute(1, 2, 0).numpy())
    return images, seconds


def compose(
    images: Sequence[Sequence[np.ndarray]], seconds: Sequence[Sequence[float]], captions: Sequence[str],
    headings: Sequence[str], *, smooth: bool = False, faster: bool = True,
) -> Image.Image:  # fmt: skip
    """The picture: captions on the left, a heading over each column, seconds under each image.

    Images smaller than 192 pixels are enlarged by a whole factor (64 by 3), to nearest pixels or, if
    `smooth`, bicubic. `faster`: each heading says how much faster than the first column it is.
    """
    height, width = images[0][0].shape[:2]
    factor = max(1, -(-_SHOWN // max(height, width)))
    cell = (max(width * factor, 150), height * factor)
    size = (
        2 * _MARGIN + _CAPTION + len(headings) * (cell[0] + _GAP),
        2 * _MARGIN + _HEADING + len(captions) * (cell[1] + _LABEL + _GAP),
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(14)

    def left(column: int) -> int:
        return _MARGIN + _CAPTION + _GAP + column * (cell[0] + _GAP)

    for column, heading in enumerate(headings):
        typical = statistics.median(row[column] for row in seconds)
        pen.text((left(column), _MARGIN), heading, _INK, large)
        gain = statistics.median(row[0] for row in seconds) / typical
        beside = f", {gain:.1f}x faster" if column and faster else ""
        pen.text((left(column), _MARGIN + 23), f"{_duration(typical)} an image{beside}", _FAINT, small)
    for row, caption in enumerate(captions):
        top = _MARGIN + _HEADING + row * (cell[1] + _LABEL + _GAP)
        text = "\n".join(_wrapped(caption, small, _CAPTION - _GAP))
        pen.multiline_text((_MARGIN, top + 4), text, _INK, small, spacing=6)
        for column, image in enumerate(images[row]):
            shown = Image.fromarray(image).resize(
                (width * factor, height * factor),
                Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST,
            )
            sheet.paste(shown, (left(column), top))
            pen.rectangle(
                (left(column), top, left(column) + width * factor - 1, top + cell[1] - 1),
                outline=(212, 212, 216),
            )
            pen.text((left(column), top + cell[1] + 4), _duration(seconds[row][column]), _FAINT, small)
    return sheet


def save(sheet: Image.Image, path: Place) -> None:
    """Write a PNG file."""
    with atomic_write(Path(path)) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
