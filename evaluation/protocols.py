"""Protocols: all that changes a number but not the model, in one small object with a name and a hash.

Two results may be compared only if their protocols' hashes agree. A result from fewer samples than the
protocol says carries that in its name, "scenes-2k[n=500]", because the Fréchet distance of fewer samples is
biased upwards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.images import open_images
from stepdistill import scenes
from stepdistill.errors import UserError, nearest

HELD_OUT_SEED = 1_000_003  # data set of scenes that training never draws from


@dataclass(frozen=True)
class SceneReference:
    """Scenes `first` .. `first + n - 1` of the data set `seed`, as rendered."""

    seed: int = HELD_OUT_SEED
    first: int = 10_000
    n: int = 4_000
    kind: str = "scenes"

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(self.first, self.first + self.n, 100):
            stop = min(start + 100, self.first + self.n)
            pixels = np.stack([scenes.image_at(index, self.seed)[1] for index in range(start, stop)])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def sha256(self) -> str:
        """Of the first 16 images: it changes when the renderer does."""
        return _sha256_of_scenes(self.seed, self.first)


@dataclass(frozen=True)
class FileReference:
    """All images of a folder or of Parquet files. Identified by their content, not by their place."""

    path: str = field(metadata={"identity": False})
    n: int
    content: str
    kind: str = "files"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FileReference:
        """Look at the files (not at every image). Raises UserError when there is none."""
        images = open_images(path)
        return cls(str(path), len(images), images.sha256())

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(open_images(self.path))

    def sha256(self) -> str:
        return self.content


@dataclass(frozen=True)
class Protocol:
    """How a number is measured.

    `conditions`: "scenes": sample i is drawn for the caption of scene `first_prompt + i` of the data set
    `prompt_seed`; "classes": for class i mod `classes`; "none": for nothing. Its noise has the seed
    `first_seed + i`.
    """

    name: str
    version: int
    n: int
    conditions: str
    reference: SceneReference | FileReference
    metrics: tuple[str, ...] = field(metadata={"identity": False})  # what can be measured under it
    prompt_seed: int = HELD_OUT_SEED
    first_prompt: int = 0
    classes: int = 0
    first_seed: int = 0
    quantise: str = "round"  # [0, 1] to uint8: round(255 x)
    extractor: str = "scenes-v1"
    about: str = field(default="", metadata={"identity": False})

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over every field that can change a number."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """All fields but those that identify nothing (explanations, places of files)."""
        found = asdict(self)
        for owner, values in ((self, found), (self.reference, found["reference"])):
            for name, spec in owner.__dataclass_fields__.items():
                if not spec.metadata.get("identity", True):
                    del values[name]
        return found

    def label(self, n: int) -> str:
        """The name a result of `n` samples is published under."""
        return self.name if n == self.n else f"{self.name}[n={n}]"

    def prompts(self, n: int) -> list[str] | list[int]:
        """Captions, or class numbers, of the first n samples."""
        if self.conditions == "scenes":
            start = self.first_prompt
            return [scenes.scene_at(index, self.prompt_seed).caption for index in range(start, start + n)]
        return [index % max(self.classes, 1) for index in range(n)]

    def seeds(self, n: int) -> list[int]:
        """Noise seeds of the first n samples."""
        return list(range(self.first_seed, self.first_seed + n))


PROTOCOLS = {
    "scenes-2k": Protocol(
        name="scenes-2k",
        version=1,
        n=2_000,
        conditions="scenes",
        reference=SceneReference(),
        metrics=("fd", "clip", "attributes", "latency"),
        about="2,000 captions of scenes no training saw, an image each, against 4,000 other rendered scenes.",
    )
}


def get_protocol(name: str | Protocol) -> Protocol:
    """The protocol of this name. Raises UserError for an unknown one."""
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise UserError(
            f"there is no protocol {name!r}; known are {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def real_images(path: str | os.PathLike[str], *, classes: int = 0, extractor: str = "scenes-v1") -> Protocol:
    """The protocol for a sampler of `classes` classes (0: unconditional) against the images at `path`.

    Its own number of samples is that of the reference; fewer are marked in the result's name as usual.

    Raises:
        UserError: there are no images at `path`.
    """
    reference = FileReference.open(path)
    return Protocol(
        name=f"images:{Path(path).stem}",
        version=1,
        n=len(reference),
        conditions="classes" if classes else "none",
        reference=reference,
        metrics=("fd", "latency"),
        classes=classes,
        extractor=extractor,
        about=f"As many images as the reference has, against all {len(reference)} images of {path}.",
    )


def checked_n(n: int | None, protocol: Protocol) -> int:
    """`n`, or the protocol's own for None. Raises UserError for what no distance can be taken of."""
    n = protocol.n if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise UserError(f"n must be a whole number of at least 2 samples, got {n!r}.")
    return n


@functools.lru_cache(maxsize=4)
def _sha256_of_scenes(seed: int, first: int) -> str:
    digest = hashlib.sha256()
    for index in range(first, first + 16):
        scene, image = scenes.image_at(index, seed)
        digest.update(scene.caption.encode() + image.tobytes())
    return digest.hexdigest()
