"""A small convolutional network whose features stand in for Inception's where nothing may be downloaded.

Fréchet distances on its features are named after it ("fd:scenes-v1") and never called FID: only distances
measured with the same network can be compared. The embedded one is trained by `training.embedded.features` to
read every attribute off a scene; with `--data parquet` the same command makes one for any labelled data set.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evaluation.pickles import SUFFIXES as PICKLES
from evaluation.settings import Place
from stepdistill.errors import UserError, atomic_write

FORMAT = "stepdistill-feature-net-1"


class Block(nn.Module):
    """Two 3 x 3 convolutions around a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(inner)))


class Down(nn.Sequential):
    """A 3 x 3 convolution to another width, with a stride."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )


class FeatureNet(nn.Module):
    """uint8 images (N, 3, H, W) to float32 features (N, dim): a ResNet of 0.5 M parameters, pooled over the
    image.

    name: what metrics call it. resolution: side of the square its images are resized to (a multiple of 32).
    dim: number of features. labels: the questions it was trained to answer, each with the names of its
    answers.
    """

    def __init__(self, name: str, resolution: int, dim: int, labels: dict[str, list[str]]):
        super().__init__()
        if resolution < 32 or resolution % 32:
            raise UserError(f"resolution is {resolution}; a feature net needs a multiple of 32.")
        self.name, self.resolution, self.dim = name, resolution, dim
        self.labels = {question: list(answers) for question, answers in labels.items()}
        # The first stride brings every resolution to 32, so that one body serves all.
        self.body = nn.Sequential(
            Down(3, 32, resolution // 32), Block(32), Down(32, 64, 2), Block(64), Down(64, dim, 2), Block(dim)
        )
        self.head = nn.Linear(dim, sum(map(len, self.labels.values())))

    @property
    def config(self) -> dict[str, Any]:
        """What `load` needs besides the weights."""
        return {
            "format": FORMAT,
            "name": self.name,
            "resolution": self.resolution,
            "dim": self.dim,
            "labels": self.labels,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, dim), float32, of uint8 images (N, 3, H, W) of any size. Raises ValueError if the images have
        another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        size = (self.resolution, self.resolution)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return self.body(x).mean((2, 3)).float()

    def for_inference(self) -> FeatureNet:
        """A copy that gives the same features (to 1e-6) in three quarters of the time on a CPU.

        Batch norms are folded into the convolutions before them, and pixels lie with their channels together,
        which is how the kernels want them.
        """
        copied = copy.deepcopy(self).eval()
        for module in list(copied.modules()):
            children = list(module.named_children())
            for (name, convolution), (norm_name, norm) in itertools.pairwise(children):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                    setattr(module, norm_name, nn.Identity())
        return copied.to(memory_format=torch.channels_last).requires_grad_(False)

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """For every question the logits of its answers, from features (N, dim)."""
        parts = self.head(features).split([len(answers) for answers in self.labels.values()], dim=1)
        return dict(zip(self.labels, parts, strict=True))

    def classify(self, features: np.ndarray) -> np.ndarray:
        """Logits (N, answers) of all questions from features (N, dim), in float64."""
        weight, bias = (part.detach().cpu().double().numpy() for part in (self.head.weight, self.head.bias))
        return np.asarray(features, np.float64) @ weight.T + bias

    def save(self, path: Place) -> None:
        """Write the directory `path`: config.json and model.safetensors in half precision."""
        from safetensors.torch import save_file

        state = {
            key: value.detach().cpu().half().contiguous() if value.is_floating_point() else value.cpu()
            for key, value in self.state_dict().items()
        }
        with atomic_write(path) as temporary:
            temporary.mkdir()
            (temporary / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Place) -> FeatureNet:
        """The network that `save` wrote, float32, in evaluation mode and without gradients.

        Raises:
            UserError: the directory is missing, incomplete, damaged, of another format, or holds pickled
            weights.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        weights = path / "model.safetensors"
        if not weights.is_file():
            pickled = next((file.name for file in sorted(path.glob("*")) if file.suffix in PICKLES), None)
            raise UserError(
                f"there is no feature net at {path}: model.safetensors is missing; "
                + (f"convert {pickled} to it: a pickle can run any code when it is opened." if pickled else
                   "name a directory that has it and config.json.")
            )  # fmt: skip
        try:
            config = json.loads((path / "config.json").read_text())
            if config.pop("format") != FORMAT:
                raise KeyError("format")
            net = cls(**config)
            net.load_state_dict(load_file(weights))
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise UserError(
                f"{path} is no feature net this version can read ({type(error).__name__}); make or copy it again."
            ) from error
        return net.eval().requires_grad_(False)
