"""Feature extractors by name: what turns images into the rows a Fréchet distance is taken of.

An extractor's name is part of the metric's name (`fd:scenes-v1`), and its weights' checksum part of every
statistics file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluation.images import as_images, rechunked
from evaluation.stats import Source
from stepdistill import assets
from stepdistill.errors import UserError, nearest

EMBEDDED = ("scenes-v1",)


@dataclass(frozen=True)
class Extractor:
    """A feature network and what identifies it.

    `network` takes uint8 (chunk, 3, H, W) and gives (chunk, dim). It always runs at the batch size `chunk`,
    padded, because the last bits of a row depend on the size of the batch it was in.
    """

    name: str
    dim: int
    sha256: str
    network: Callable[[Tensor], Tensor]
    chunk: int = 50
    resize: str = "none"

    @property
    def source(self) -> Source:
        """What statistics made with this extractor are marked with."""
        return Source(self.name, self.sha256, self.resize)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (N, dim) of images uint8 (N, 3, H, W). Raises UserError for other tensors."""
        rows = [
            padded(self.network, part, self.chunk)
            for part in as_images(images).split(self.chunk)
            if len(part)
        ]
        return torch.cat(rows).float().cpu() if rows else torch.empty(0, self.dim)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Features of all batches in order. Chunks are formed by index: batch sizes don't change a bit."""
        for chunk in rechunked(batches, self.chunk):
            yield self(chunk)


def load_extractor(name: str | os.PathLike[str] = "scenes-v1", device: str = "cpu") -> Extractor:
    """The embedded extractor "scenes-v1", or one from a directory with `config.json` and `model.safetensors`.

    Raises:
        UserError: there is no such extractor, or its files are missing or damaged.
    """
    from evaluation.feature_net import FeatureNet

    path = assets.path(str(name)) if str(name) in EMBEDDED else Path(name)
    if not path.is_dir():
        raise UserError(
            f"there is no extractor {str(name)!r}; use {', '.join(EMBEDDED)} or a directory with config.json "
            f"and model.safetensors.{nearest(str(name), EMBEDDED)}"
        )
    network = FeatureNet.load(path).to(device)
    sha256 = hashlib.sha256(
        (path / "config.json").read_bytes() + (path / "model.safetensors").read_bytes()
    ).hexdigest()
    resize = f"bilinear, antialiased, to {network.resolution}"
    return Extractor(
        network.name, network.dim, sha256, lambda images: network(images.to(device)), resize=resize
    )


def padded(network: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """`network(images)` for at most `size` rows, run at exactly `size` rows."""
    missing = size - len(images)
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return network(images)[: size - missing]
