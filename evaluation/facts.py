"""What a pass over a set of images notices, and what a reader of a number has to know of it."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# What is said of images with a trait, where some have it. "lossy" is said of two sets together.
RULES = {
    "grey": "are stored without colour",
    "CMYK": "are CMYK and were converted to RGB as Pillow does it, and ADM's and EDM2's tools with it",
    "orientation": "carry an EXIF orientation, which is not applied: no tool of a public reference does",
    "animated": "are animated, of which the first frame counts",
    "small": "are smaller than the patch and were resized to it, as they are uncropped in the source",
}


@dataclass
class Facts:
    """What a pass over a set noticed.

    size: (width, height) after a Resize. traits: how many images are "lossy" (JPEG, lossy WebP, AVIF), or have a
    trait of RULES. hashes: 64 bits of every image's pixels. skipped: files that were left out, by reason.
    """

    n: int = 0
    size: tuple[int, int] | None = None
    traits: Counter = field(default_factory=Counter)
    hashes: array = field(default_factory=lambda: array("Q"))
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def duplicates(self) -> int:
        """Images whose pixels another one before them has."""
        return len(self.hashes) - len(self._distinct()) if self.n else 0

    def shared_with(self, other: Facts) -> int:
        """Different images that both sets have."""
        both = [one._distinct() for one in (self, other) if one.n]
        return len(np.intersect1d(*both)) if len(both) == 2 else 0

    def _distinct(self) -> np.ndarray:
        return np.unique(np.frombuffer(self.hashes, dtype=np.uint64))


def pixel_hash(pixels: np.ndarray) -> int:
    """64 bits of the pixels."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=8).digest(), "little")


def counted(parts: Mapping[str, int]) -> str:
    """ "3 .txt, 1 hidden" of {".txt": 3, "hidden": 1}."""
    return ", ".join(
        f"{count} {reason}" for reason, count in sorted(parts.items(), key=lambda x: (-x[1], x[0]))
    )


def doubts_of(facts: Facts | None, what: str) -> list[str]:
    """What is odd in one set; `what`: "images", "images of the reference"."""
    if facts is None:
        return []
    doubts = []
    if facts.skipped:
        doubts.append(f"files left out beside the {what}: {counted(facts.skipped)}.")
    if facts.duplicates:
        doubts.append(f"{facts.duplicates} of {facts.n} {what} have the same pixels as another one.")
    return doubts + [
        f"{facts.traits[trait]} of {facts.n} {what} {rule}."
        for trait, rule in RULES.items()
        if facts.traits[trait]
    ]


def doubts_between(own: Facts | None, reference: Facts | None) -> list[str]:
    """What makes a distance of two sets that is not what they show."""
    if own is None or reference is None:
        return []
    doubts = []
    if own.size != reference.size:
        sizes = " and ".join(f"{width}x{height}" for width, height in (own.size, reference.size))
        doubts.append(f"the two sets differ in size, {sizes}: resizing alone makes a distance.")
    lossy = own.traits["lossy"], reference.traits["lossy"]
    if bool(lossy[0]) != bool(lossy[1]):
        counts = f"{lossy[0]} of {own.n} images and {lossy[1]} of the {reference.n} of the reference"
        doubts.append(f"{counts} are JPEG or stored with losses like it, which alone make a distance.")
    if shared := own.shared_with(reference):
        doubts.append(f"{shared} different images are in both sets.")
    return doubts
