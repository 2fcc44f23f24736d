"""The contract of a data source, the order of its examples, its partitions, and how sources read and count."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stepdistill import routing
from stepdistill.errors import UserError
from training.data.buckets import Bucket, Size

# Buckets that a description lists.
SAID = 8


def image_size(resolution: int | Size) -> Size:
    """(height, width) of a recipe's resolution, [height, width] or the side of a square."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


class Unreadable(UserError):
    """An example, `index`, that could be read when its source was opened and cannot be read now."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(f"{why}; start again.")
        self.index = index


class Source:
    """Examples by index, 0 .. size - 1.

    Args:
        config: of the class's own `Config`, the recipe's `data` section.

    Attributes:
        size: examples kept.
        image_size: (height, width) of the images in pixels, (0, 0) without; with buckets, what their areas are about.
        bucketed: whether images have several sizes, those of `buckets`.
        frames: of each example, which is a video where it has several.
        has_images: whether `images` works; a source of prompts has none.
        captions: one text per example, the first where there are several, or None.
        texts: all texts of each example, where one has several; else None.
        labels: one class number per example, or None; `class_names[label]` is its name.
        counts: "kept", and for every reason to drop an example, how many it was.
        routing: by which rule conditions belong to this part of a partition, or None; goes into the card.
    """

    has_images: bool = True
    bucketed: bool = False
    frames: int = 1
    # What its examples are called.
    noun: str = "images"

    def __init__(self, config: Any) -> None:
        self.config = config
        self.size = 0
        self.image_size = image_size(getattr(config, "resolution", 0))
        self.captions: Sequence[str] | None = None
        self.texts: Sequence[Sequence[str]] | None = None
        self.labels: Sequence[int] | None = None
        self.class_names: tuple[str, ...] | None = None
        self.counts: dict[str, int] = {}
        self.routing: dict[str, Any] | None = None

    def all_captions(self) -> Iterator[str]:
        """Every text that an example may be given, some more than once."""
        for texts in self.texts or ():
            yield from texts
        if self.texts is None:
            yield from self.captions or ()

    def caption(self, index: int, use: int = 0) -> str:
        """The text of an example in its `use`-th use, from 0: its texts in turn, so that each has been used after as many
        uses as it has texts.
        """
        if self.texts is None:
            return self.captions[index]
        texts = self.texts[index]
        # The first use is of any of them.
        return texts[(index + use) % len(texts)]

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The examples by the size of their images, none of them empty."""
        return [Bucket(self.image_size, range(self.size))]

    def order(self, seed: int, size: int, first: int, count: int) -> list[int]:
        """Rows of a bucket of `size` examples, see `order`; of a source that reads some of them together, nearer ones."""
        return order(seed, size, first, count)

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """What SDXL is told of images (n, 6), in pixels: height and width of the whole image before it was resized, how
        much is cut off at the top and at the left of what it was resized to, height and width of what is left.
        """
        return np.tile(np.array([*self.image_size, 0, 0, *self.image_size], np.int64), (len(indices), 1))

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (n, height, width, 3), RGB, of examples of one bucket; of videos (n, frames, height, width, 3).

        Raises:
            UserError: the source has no images; as Unreadable, one of them is gone.
        """
        raise UserError(
            f"the data source {type(self).__name__.lower()} has no images; this method or family needs them."
        )

    def fingerprint(self) -> str:
        """Hexadecimal text that changes with the content and with what is done to it, not with where it lies;
        names caches.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """One line: what there is and what was dropped."""
        parts = [f"{self.size:,} {self.noun if self.has_images else 'examples'}"]
        parts[0] += f" of {self.frames} frames" * (self.frames > 1)
        if self.has_images:
            parts[0] += self._sizes_said()
        parts += self._captions_said()
        parts += [f"{len(self.class_names)} classes"] if self.class_names else []
        dropped = ", ".join(f"{n:,} {why}" for why, n in self.counts.items() if why != "kept" and n)
        where = getattr(self.config, "path", "")
        name = f"{type(self).__name__.lower()} {where}".strip()
        return f"{name}: {', '.join(parts)}" + (f"; left out: {dropped}" if dropped else "")

    def _sizes_said(self) -> str:
        if not self.bucketed:
            return " at {}x{}".format(*self.image_size)
        listed = sorted(self.buckets, key=lambda bucket: -len(bucket.members))
        said = ", ".join(f"{len(each.members):,} at {each.size[0]}x{each.size[1]}" for each in listed[:SAID])
        return f" in {len(listed)} bucket{'s' * (len(listed) > 1)} ({said}{', ...' * (len(listed) > SAID)})"

    def _captions_said(self) -> list[str]:
        if self.texts is None:
            return ["captions"] if self.captions is not None else []
        counts = {len(texts) for texts in self.texts}
        return [
            f"{min(counts)} to {max(counts)} captions each"
            if len(counts) > 1
            else f"{min(counts)} captions each"
        ]


# Examples whose whole order is kept, 128 MiB; of more, the places that are asked for are computed one by one.
LISTED = 1 << 24


def _permuted(seed: int, epoch: int, size: int, places: np.ndarray) -> np.ndarray:
    """What a permutation of 0 .. size - 1 has at `places`, in no more memory than they take: a Feistel network of four
    rounds on the next power of 4, walked on from what lies beyond `size` (Black & Rogaway 2002, "Ciphers with arbitrary
    finite domains").
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng((seed, epoch)).integers(0, 1 << 63, 4, dtype=np.uint64)
    low = np.uint64((1 << int(half)) - 1)
    found, walking = places.copy(), np.ones(len(places), bool)
    while walking.any():
        left, right = found[walking] >> half, found[walking] & low
        for key in keys:
            # The finaliser of splitmix64.
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & low)
        found[walking] = (left << half) | right
        walking = found >= size
    return found


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def order(seed: int, size: int, first: int, count: int) -> list[int]:
    """Dataset indices, 0 .. size - 1, of the `count` samples that come after the first `first` of a run.

    They are cut out of one endless sequence, a permutation of 0 .. size - 1 per epoch, each from (seed, epoch)
    alone. Nothing is remembered between calls, and neither a process count nor a batch size enters: a resumed run sees
    what an uninterrupted one sees, and one whose batches have another size now repeats and skips nothing.

    Raises:
        ValueError: `size` or `count` is below 1.
    """
    if size < 1 or count < 1:
        raise ValueError(f"size and count must be at least 1, got {size} and {count}.")
    start, stop = first, first + count
    indices: list[int] = []
    while start < stop:
        epoch, at = divmod(start, size)
        until = min(size, at + stop - start)
        if size <= LISTED:
            indices += _permutation(seed, epoch, size)[at:until].tolist()
        else:
            indices += _permuted(seed, epoch, size, np.arange(at, until, dtype=np.uint64)).tolist()
        start += until - at
    return indices


@dataclass(frozen=True)
class Partition:
    """What every source's Config begins with: which part of the examples to take.

    Attributes:
        partition: "k/K", part k (from 1) of K: a block of the classes, a cluster of the captions
            (stepdistill/routing.py) or, where there are neither, a block of the examples. "" = all.

    Raises:
        ValueError: it is of another form.
    """

    partition: str = ""

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> tuple[int, int]:
        """(k, K); (1, 1) without a partition."""
        k, slash, of = self.partition.partition("/")
        if not self.partition:
            return 1, 1
        if not (slash and k.strip().isdecimal() and of.strip().isdecimal() and 1 <= int(k) <= int(of)):
            raise ValueError(f"partition must look like 1/2 (first of two), got {self.partition!r}.")
        return int(k), int(of)

    def block(self, count: int) -> range:
        """The contiguous share of `count` things that is ours; UserError if there are fewer than parts."""
        k, of = self.parts()
        if count < of:
            raise UserError(
                f"data.partition={self.partition} asks for {of} parts, but there are only {count}."
            )
        return range((k - 1) * count // of, k * count // of)

    def of_captions(self, captions: Sequence[str]) -> tuple[list[int], dict[str, Any] | None]:
        """The numbers of the captions in our cluster, and the rule by which prompts are routed to it."""
        k, of = self.parts()
        if of == 1:
            return list(range(len(captions))), None
        centroids = routing.cluster(captions, of)
        ours = np.flatnonzero(routing.nearest(captions, centroids) == k - 1).tolist()
        return ours, {"by": "prompt", "of": of, "part": k, "centroids": centroids.tolist()}

    def of_classes(self, count: int) -> tuple[range, dict[str, Any] | None]:
        """Our block of the classes, and the rule by which classes are routed to it."""
        k, of = self.parts()
        blocks = [[i * count // of, (i + 1) * count // of] for i in range(of)]
        rule = {"by": "class", "of": of, "part": k, "blocks": blocks} if of > 1 else None
        return self.block(count), rule


# What sources share -----------------------------------------------------------------------------------------


def at_least(least: float, **values: float) -> None:
    """ValueError, naming it, for a value that is below `least` or not finite."""
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def counts(kept: int, dropped: dict[str, int]) -> dict[str, int]:
    """`Source.counts`: the reasons that occurred, after "kept"."""
    return {"kept": kept, **{why: n for why, n in dropped.items() if n}}


def because(dropped: dict[str, int]) -> str:
    """The reasons that occurred, for a message: " (3 too small, 1 unreadable image)", or ""."""
    listed = ", ".join(f"{n:,} {why}" for why, n in dropped.items() if n)
    return f" ({listed})" if listed else ""


def facts(config: Any) -> str:
    """The settings that change what an example is; where it lies, how much is cached and how it is shown do not."""
    shown = ("path", "memory_gb", "flip")
    values = {key: value for key, value in asdict(config).items() if key not in shown}
    return json.dumps(values, sort_keys=True, default=str)


def digest(parts: Iterable[str | bytes]) -> str:
    """20 hexadecimal digits of the SHA-256 of the parts and their lengths."""
    hashed = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()[:20]
