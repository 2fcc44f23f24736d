"""Sets of images that samples are compared with: rendered, a person's own, or public ones that a protocol names."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.decoding import AS_STORED, Resize
from evaluation.files import open_images
from evaluation.images import Images, ResizedImages
from evaluation.settings import Place
from stepdistill import assets, scenes
from stepdistill.errors import UserError
from stepdistill.provenance import sha256_of_files
from stepdistill.scenes import HELD_OUT_SEED

# The folder of the references and captions that protocols name.
ENVIRONMENT = "STEPDISTILL_REFERENCES"
# Marks a field that identifies nothing: an explanation, the place of a file.
UNHASHED = {"identity": False}
# Marks a field the hash leaves out at its default.
LATER = {"later": True}
_SUFFIXES = ("", ".npz", ".zip", ".tar", ".parquet", ".npy")


@dataclass(frozen=True)
class SceneReference(Images):
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

    def resized(self, resize: Resize = AS_STORED) -> Images:
        """The images with this done to them."""
        return ResizedImages(self, resize) if resize else self

    def watched(self) -> Images:
        """Itself: there is nothing to notice."""
        return self

    def sha256(self) -> str:
        """Of the first 16 images: it changes when the renderer does."""
        return _sha256_of_scenes(self.seed, self.first)


@dataclass(frozen=True)
class FileReference:
    """All images of a folder, an archive or an array. Identified by their content, not by their place."""

    path: str = field(metadata=UNHASHED)
    n: int
    content: str
    kind: str = "files"

    @classmethod
    def open(cls, path: Place) -> FileReference:
        """Look at the files (not at every image). Raises UserError when there is none."""
        images = open_images(path)
        return cls(str(path), len(images), images.sha256())

    def __len__(self) -> int:
        return self.n

    def resized(self, resize: Resize = AS_STORED) -> Images:
        """The images with this done to them as they are stored."""
        return open_images(self.path, resize=resize)

    def sha256(self) -> str:
        return self.content


@dataclass(frozen=True)
class NamedReference:
    """A public set of images that is not ours to ship: the protocol fixes which, a person says where it is.

    It is identified by `name`, `n` and how its images are brought to size; its content goes into the result.
    `path` is where images or statistics (.npz) are, "" while it is not known. `files`: what to download, a line each:
    the file's name, its size, where from.
    """

    name: str
    n: int
    resize: Resize = field(default_factory=Resize)
    kind: str = "named"
    about: str = field(default="", metadata=UNHASHED)
    files: tuple[str, ...] = field(default=(), metadata=UNHASHED)
    path: str = field(default="", metadata=UNHASHED)

    def __len__(self) -> int:
        return self.n

    def resized(self, resize: Resize | None = None) -> Images:
        """The images with this done to them as they are stored, None: `resize`."""
        return open_images(self.path, resize=self.resize if resize is None else resize)

    def sha256(self) -> str:
        """Of the content at `path`; "" while nothing is there."""
        if not self.path:
            return ""
        if holds(self.path) == {"images"}:
            return open_images(self.path).sha256()
        return sha256_of_files([Path(self.path)], Path(self.path).parent)

    def located(self, path: Place | None = None) -> NamedReference:
        """The same with its `path`, searched for unless given. Raises UserError if it is in no place that was looked
        at, or has not `n` images.
        """
        place = find(path, self.name, _SUFFIXES, "the reference", self.about, "--reference")
        known = replace(self, path=str(place))
        if "statistics" not in holds(place) and (count := len(open_images(place))) != self.n:
            raise UserError(
                f"{place} has {count} images, but the reference {self.name} has {self.n}; {self.about}"
            )
        return known


def holds(path: Place) -> set[str]:
    """What is at `path`: "statistics", "images", or both, as in ADM's reference batches."""
    try:
        with zipfile.ZipFile(path) as file:
            arrays = set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        # Of a damaged .npz, whoever reads it says what is wrong.
        return {"statistics" if str(path).endswith(".npz") else "images"}
    if not str(path).endswith(".npz"):
        return {"images"}
    return ({"images"} if "arr_0.npy" in arrays else set()) | (
        {"statistics"} if "arr_0.npy" not in arrays or "mu.npy" in arrays else set()
    )


def reference_folders() -> list[Path]:
    """Where references and captions are looked for: $STEPDISTILL_REFERENCES, then references/ beside assets/."""
    given = os.environ.get(ENVIRONMENT)
    return [*([Path(given)] if given else []), assets.ROOT.parent / "references"]


def find(path: Place | None, name: str, suffixes: Iterable[str], what: str, about: str, option: str) -> Path:
    """`path`, or the first `name` + suffix in the folders that are looked at. Raises UserError if nothing is there; it
    says where was looked and what belongs there.
    """
    places = (
        [Path(path)] if path else [folder / f"{name}{s}" for folder in reference_folders() for s in suffixes]
    )
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"there is nothing for {what} {name} at {', '.join(map(str, places))}; {about} Name its place with {option}, "
        f"or put it into the folder that ${ENVIRONMENT} names."
    )


@functools.lru_cache(maxsize=4)
def _sha256_of_scenes(seed: int, first: int) -> str:
    digest = hashlib.sha256()
    for index in range(first, first + 16):
        scene, image = scenes.image_at(index, seed)
        digest.update(scene.caption.encode() + image.tobytes())
    return digest.hexdigest()
