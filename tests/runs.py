"""Runs that tests share: small recipes on the toy and on the tiny pipelines, and what a run has left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from worlds import SETTINGS, STEPS

from stepdistill.config import apply_overrides
from training.checkpoint import Checkpoint, RunDirectory
from training.recipe import Recipe, recipe_from
from training.trainer import Trainer

TOY = {
    "family": {"name": "toy", "fit_steps": 3},
    "student": {"steps": [1, 2], "ema": 0.5},
    "method": {"name": "dmd2", "student_every": 2, "guidance_scale": 1.0},
    "data": {"name": "toy", "size": 40},
    "optim": {"lr": 1e-3, "batch_size": 16, "schedule": "cosine"},
    "run": {"steps": 6, "log_every": 2, "trackers": []},
}
LCM = {"name": "lcm", "guidance_low": 1.0, "guidance_high": 2.0, "ddim_steps": 4}
GAN = {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "guidance_scale": 2.0}


def toy(out: Path, *overrides: str, **sections: Any) -> Recipe:
    mapping = {**TOY, **sections, "run": {**TOY["run"], **sections.get("run", {}), "out": str(out)}}
    return recipe_from(apply_overrides(mapping, overrides))


def sd(out: Path, teacher: Path, *overrides: str, **sections: Any) -> Recipe:
    """DMD2 on the 16x16 pipeline; scenes are drawn at that size where images are needed."""
    family = {"name": "sd", "teacher": str(teacher)}
    data = {"name": "scenes", "size": 24, "resolution": 16}
    optim = {**TOY["optim"], "batch_size": 4}
    return toy(out, *overrides, **{"family": family, "data": data, "optim": optim, "method": GAN, **sections})


def checkpoint(out: Path, step: int | None = None) -> Checkpoint:
    directory = RunDirectory(out)
    return directory.load(directory.latest() if step is None else step)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, in whatever is nested."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if "seconds" not in str(key))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one: Path, other: Path) -> None:
    a, b = checkpoint(one), checkpoint(other)
    assert same(a.tensors, b.tensors) and same(a.optimizers, b.optimizers) and same(a.extra, b.extra)
    assert metrics(one) == metrics(other)


def interrupt_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C while `step` (0-based, over all stages) is being computed."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def labelled_images(folder: Path, classes: int = 3, each: int = 4, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")
    return folder


def pixel(out: Path, teacher: Path, images: Path, *overrides: str) -> Recipe:
    family = {"name": "pixel", "teacher": str(teacher)}
    data = {"name": "folder", "path": str(images), "resolution": 8}
    return toy(out, "run.steps=2", "optim.batch_size=4", *overrides, family=family, data=data)


PAIRS = {"pair_count": 16, "pair_steps": 2}
# What keeps two runs of five iterations short, and resuming worth a test.
SMALL: dict[str, dict[str, Any]] = {
    "dmd": PAIRS,
    "dmd2": {"student_every": 2, "gan_weight": 0.1},
    # The curriculum moves in every iteration.
    "ect": {"double_every": 1, "stages": 4},
    "kd": PAIRS,
    "scm": {"warmup": 4},
    "ladd": {"warmup": 3},
    "lcm": {"ddim_steps": 4},
    "compose": {
        "parts": [
            {"name": "scm", "warmup": 4},
            {"name": "ladd", "warmup": 3, "misaligned": True},
        ]
    },
    "disback": {"stage": "degrade", "path": 2, "interval": 1},
}


def of_method(name: str, out: Path, *overrides: str) -> Recipe:
    """Any registered method on the toy, five iterations of it; code of the tests' own must be allowed."""
    mapping = {
        "family": {"name": "toy", "modes": 4, "classes": 2, "fit_steps": 2},
        "student": {"steps": list(STEPS.get(name, (1, 2))), "ema": 0.5},
        "method": {"name": name, **SETTINGS.get(name, {}), **SMALL.get(name, {})},
        "data": {"name": "toy", "size": 40},
        "optim": {"lr": 1e-2, "batch_size": 8, "schedule": "cosine"},
        "run": {
            "out": str(out),
            "steps": 5,
            "save_every": 3,
            "keep": 9,
            "log_every": 1,
            "trackers": [],
        },
    }
    return recipe_from(apply_overrides(mapping, overrides))
