"""What the small loops behind the embedded assets share: scenes, questions, learning rate, reports."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from stepdistill import scenes
from stepdistill.errors import UserError, atomic_write, cli_errors


def scene_pool(count: int, seed: int = 0) -> tuple[list[scenes.Scene], Tensor]:
    """The first `count` scenes of the data set `seed` and their images, uint8 (count, 3, 64, 64)."""
    drawn = [scenes.image_at(index, seed) for index in range(count)]
    images = torch.from_numpy(np.stack([image for _, image in drawn])).permute(0, 3, 1, 2).contiguous()
    return [scene for scene, _ in drawn], images


_OPPOSITE = {"below": "above", "right of": "left of"}


def canonical(scene: scenes.Scene) -> scenes.Scene:
    """The same for every scene with the same pictures: "a below b" becomes "b above a"."""
    if scene.relation in _OPPOSITE:
        return scenes.Scene(scene.objects[::-1], _OPPOSITE[scene.relation], scene.background)
    return scene


# What one can read off a picture, and the answers: the first object is the upper or left one, or the only one.
NOTHING = "none"
QUESTIONS: dict[str, tuple[str, ...]] = {
    "first shape": scenes.SHAPES,
    "first colour": tuple(scenes.COLOURS),
    "first size": scenes.SIZES,
    "second shape": (*scenes.SHAPES, NOTHING),
    "second colour": (*scenes.COLOURS, NOTHING),
    "second size": (*scenes.SIZES, NOTHING),
    "relation": ("above", "left of", NOTHING),
    "background": tuple(scenes.COLOURS),
}


def answers(scene: scenes.Scene) -> list[int]:
    """The index of the right answer to each of QUESTIONS."""
    scene = canonical(scene)
    first, second = (*scene.objects, None)[:2]
    said = [first.shape, first.colour, first.size]
    said += [second.shape, second.colour, second.size] if second else [NOTHING] * 3
    said += [scene.relation or NOTHING, scene.background]
    return [choices.index(answer) for choices, answer in zip(QUESTIONS.values(), said, strict=True)]


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded to the nearest."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def warmup_and_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """A linear warm-up that ends at the optimiser's rate after `warmup` steps, then half a cosine down to 0 at
    `steps`.

    (diffusers' own starts at rate 0, so its first step is none.)
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, from the mean squared error over all of them."""
    error = (images.double() - others.double()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-12))


def prepare(threads: int, seed: int) -> None:
    """Set the number of threads and every seed."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def positive(name: str, value: int) -> int:
    """`value`, if it is at least 1.

    Raises:
        UserError: it is less.
    """
    if value < 1:
        raise UserError(f"--{name} is {value}; give 1 or more.")
    return value


def loop_options(
    parser: argparse.ArgumentParser, steps: int, batch: int, lr: float, pool: int, of_pool: str
) -> None:
    """Options of a loop over drawn scenes, with its own defaults; of_pool: what is kept in memory."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=batch, help="images per step")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--pool", type=int, default=pool, help=of_pool)
    parser.add_argument("--partial", default="", help="file to go on from, written every half minute")


def asked(
    parser: argparse.ArgumentParser,
    train: Callable[[argparse.Namespace], None],
    counts: Sequence[str] = ("steps", "threads", "batch", "pool"),
) -> None:
    """`train` with what the command line says; a count below 1 is one sentence and exit code 2."""
    args = parser.parse_args()
    with cli_errors():
        for name in counts:
            positive(name.replace("_", "-"), getattr(args, name))
        train(args)


def checker_accuracy(images: Tensor, drawn: Sequence[scenes.Scene]) -> dict[str, float]:
    """Attribute accuracies of uint8 images (N, 3, H, W) against the scenes they should show."""
    return scenes.attribute_accuracy(images.permute(0, 2, 3, 1).numpy(), [scene.caption for scene in drawn])


def write_report(path: str | os.PathLike[str], started: float, **values: Any) -> None:
    """Write what a training run measured as JSON, with its duration and the machine it ran on, and print it."""
    report = values | {
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    text = json.dumps(report, indent=2)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text + "\n")
    print(text, flush=True)


def command(module: str, args: argparse.Namespace, names: Sequence[str]) -> str:
    """The command line that repeats a training, for its report."""
    given = {name: getattr(args, name) for name in names}
    return " ".join([f"python -m {module}", *(f"--{name} {value}" for name, value in given.items() if value)])
