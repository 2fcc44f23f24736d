"""What the tests of evaluation share: a random extractor, pictures, a pipeline that paints, a refused command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation import pareto
from evaluation.__main__ import main
from evaluation.extractors import Extractor
from evaluation.images import MemoryImages
from evaluation.inception import Inception
from evaluation.metrics.base import Inputs
from evaluation.stats import FeatureStats
from stepdistill import scenes
from stepdistill.card import Card
from stepdistill.drawing import Drawer


def tiny_extractor(name: str = "tiny", dim: int = 24) -> Extractor:
    """A random three-layer network: random features are enough to notice blur, noise and missing classes."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / np.prod(shape[1:]) ** 0.5

    layers = [weight(12, 3, 5, 5), weight(16, 12, 3, 3), weight(dim // 2, 16, 3, 3)]
    # Half of the first filters see edges alone.
    layers[0][:6] -= layers[0][:6].mean((2, 3), keepdim=True)

    def network(images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        for layer in layers:
            x = F.leaky_relu(F.conv2d(x, layer, stride=2, padding=1), 0.1)
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    return Extractor(name, dim, "0" * 64, network, chunk=16)


def pictures(first: int, count: int, seed: int = 7) -> Tensor:
    drawn = np.stack([scenes.image_at(index, seed)[1] for index in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def stats_of(images: Tensor, extractor: Extractor) -> FeatureStats:
    return FeatureStats(extractor.dim, extractor.source).add(extractor(images))


def save_images(folder: Path, images: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def save_scenes(folder: Path, count: int = 6, size: int = 64, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        Image.fromarray(scenes.image_at(index, 3)[1][:size, :size]).save(folder / f"{index}.png")
    return folder


class Painter:
    """Stands for a Sampler: renders the caption; fewer steps and other guidance than 2 add noise."""

    resolution, class_names, family, conditions = (64, 64), None, "sd", "prompt"
    parameters: ClassVar[dict[str, int]] = {"denoiser": 1, "text": 1, "decoder": 1}
    default_steps = 1

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.name, self.kind = path, path.name, kind
        self.steps = (1, 2) if kind == "student" else None
        self.guidance_free = kind == "student"
        self.default_guidance = 1.0 if self.guidance_free else 3.0
        self.card = Card(kind=kind, method="dmd2" if kind == "student" else "")
        self.device = torch.device("cpu")
        self.drawn = 0

    def trace(self) -> Painter:
        return self

    def calls(self, guidance: float) -> int:
        return 1 if guidance == 1 else 2

    def at(self, steps=None, guidance=None, *, chunk=16, quantise="round", negative=None) -> Drawer:
        steps = self.default_steps if steps is None else steps
        return Drawer(self, steps, self.default_guidance if guidance is None else guidance, chunk, quantise)

    def draw(self, drawer: Drawer, prompts, seeds, on_step=None, negatives=None, timings=None, images=None):
        self.drawn += len(prompts)
        drawn = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            image = scenes.render(scenes.parse_caption(prompt), rng).astype(float)
            amount = 60 / drawer.steps + (0 if self.guidance_free else 60 * abs(drawer.guidance - 2))
            drawn.append(np.clip(image + amount * rng.standard_normal(image.shape), 0, 255).astype(np.uint8))
        for name in ("text", "denoise", "decode"):
            timings is not None and timings.update({name: timings.get(name, 0) + 0.001 * drawer.steps})
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


class ClassPainter(Painter):
    """Stands for a class-conditional Sampler of 32 pixels: a colour for each class, with noise."""

    resolution, class_names, conditions = (32, 32), tuple("0123456789"), "class"

    def __init__(self, path: Path) -> None:
        super().__init__(path, "student")

    def draw(self, drawer: Drawer, prompts, seeds, *_) -> Tensor:
        draws = [
            np.random.default_rng(seed).integers(0, 200, (3, 32, 32)) + 5 * kind
            for kind, seed in zip(prompts, seeds, strict=True)
        ]
        return torch.from_numpy(np.stack(draws).astype(np.uint8))


def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on reports have no plots, which take longer than what a tiny run measures."""
    monkeypatch.setattr(pareto, "plotted", lambda results: {})


def refused(capsys, *arguments: object) -> str:
    """The one sentence a wrong command ends with."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def rows(n: int, dim: int = 7, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32) + np.float32(shift)


def given(x: np.ndarray, y: np.ndarray | None = None, teacher: np.ndarray | None = None, **fields) -> Inputs:
    """Inputs whose images are stand-ins: their features are those given."""
    extractor = Extractor("tiny", x.shape[1], "0" * 64, lambda images: images)
    inputs = Inputs(MemoryImages([blank(len(x))]), extractor=extractor, **fields)
    inputs.__dict__["features"] = x
    if y is not None:
        inputs.__dict__["reference_features"] = y
    if teacher is not None:
        inputs.teacher, inputs.__dict__["teacher_features"] = MemoryImages([blank(len(teacher))]), teacher
    return inputs


def blank(n: int) -> Tensor:
    return torch.zeros(n, 3, 1, 1, dtype=torch.uint8)


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """He-initialised, with batch norms that scale and shift, so that no layer can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return like.clone()
        drawn = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            return drawn * (2 / like[0].numel()) ** 0.5
        if name.endswith(("running_var", "bn.weight")):
            return 1 + 0.2 * drawn.clamp(-3, 3)
        return 0.1 * drawn

    return {name: fill(name, like) for name, like in Inception().state_dict().items()}


def run_command(folder: Path, net: Path, *more: object, out: Path | None = None) -> dict[str, Any]:
    """results.json of the command `run` on the student and the teacher in a folder."""
    out = out or folder / "out"
    words = ["run", "--pipeline", folder / "student", "--teacher", folder / "teacher", "--teacher-steps", 8]
    main([str(word) for word in (*words, "--extractor", net, "--out", out, *more)])
    return json.loads((out / "results.json").read_text())
