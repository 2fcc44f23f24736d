"""Images that lie encoded somewhere: what can be used of them, decoded to one size."""

from __future__ import annotations

import collections
import functools
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stepdistill.errors import UserError
from training.data.base import (
    Partition,
    Source,
    Unreadable,
    at_least,
    because,
    counts,
    digest,
    facts,
    image_size,
)
from training.data.buckets import Bucket, Size, bucket_sizes
from training.data.decoding import Cut, decoded

# Images decoded at a time, and the bytes of them that are held, encoded and decoded.
CHUNK, CHUNK_BYTES, PIXEL_BYTES = 256, 64 << 20, 256 << 20
MOST_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Files(Partition):
    """What the sources of stored images have in common.

    Attributes:
        path: where they lie.
        resolution: [height, width] in pixels that images are resized to, at least 8, once they are cut to that shape
            about their centre; or the side of a square.
        enable_bucket: images keep about their aspect ratio: each goes to the bucket of the nearest, of about the area of
            `resolution`. Every batch is of one bucket.
        bucket_reso_steps: what the sides of buckets are multiples of; min_bucket_reso, max_bucket_reso: the least and the
            greatest side, 0 = half and twice that of a square of that area.
        aspect_ratio_buckets: [height, width] of each bucket, in place of those.
        min_size: images whose shorter side is below this are dropped; 0 = keep and enlarge.
        flip: in every use an image is mirrored, left to right, or not, each half of the times.
        memory_gb: up to this (GiB), decoded images stay in memory. Beyond it a batch is read and decoded when it is
            asked for; a shuffled batch of a Parquet file then reads whole row groups, so encode such data to
            latents first.
    """

    path: Path
    resolution: int | Size = 64
    enable_bucket: bool = False
    bucket_reso_steps: int = 64
    min_bucket_reso: int = 0
    max_bucket_reso: int = 0
    aspect_ratio_buckets: tuple[Size, ...] = ()
    min_size: int = 0
    flip: bool = False
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(8, resolution=min(image_size(self.resolution)))
        at_least(0, min_size=self.min_size, memory_gb=self.memory_gb)
        at_least(8, bucket_reso_steps=self.bucket_reso_steps)
        at_least(0, min_bucket_reso=self.min_bucket_reso, max_bucket_reso=self.max_bucket_reso)
        if self.aspect_ratio_buckets:
            at_least(8, aspect_ratio_buckets=min(min(size) for size in self.aspect_ratio_buckets))
        self.sizes()

    def sizes(self) -> tuple[Size, ...]:
        """(height, width) that images may get."""
        size = image_size(self.resolution)
        if self.aspect_ratio_buckets:
            return tuple(dict.fromkeys(self.aspect_ratio_buckets))
        if not self.enable_bucket:
            return (size,)
        return bucket_sizes(size, self.bucket_reso_steps, self.min_bucket_reso, self.max_bucket_reso)


@dataclass
class Listing:
    """What a source has found, before anything is decoded.

    Attributes:
        total: examples listed.
        captions: the texts of each, none to several, or None where nothing has any; labels: as `Source.labels`, None
            for one without.
        dropped: what is not among them, by reason.
    """

    total: int
    captions: Sequence[Sequence[str]] | None = None
    labels: Sequence[int | None] | None = None
    class_names: tuple[str, ...] = ()
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)


class Stored(Source):
    """Encoded images with captions or labels; subclasses list them and read their bytes.

    Every image is decoded once at opening, so a broken file is counted now and ends no run at hour ten.
    """

    def _open(self, listing: Listing) -> None:
        """Drop what cannot be used of the listed examples and take stock of the rest."""
        self.bucketed = self.config.enable_bucket or bool(self.config.aspect_ratio_buckets)
        captions, labels, dropped = listing.captions, listing.labels, listing.dropped
        candidates = []
        for i in self._ours(listing):
            missing = "no caption" if captions is not None and not captions[i] else ""
            missing = "no label" if labels is not None and labels[i] is None else missing
            if missing:
                dropped[missing] += 1
            else:
                candidates.append(i)
        kept = self._kept = self._decode(candidates, dropped)
        self.size = len(kept)
        if captions is not None:
            texts = [captions[i] for i in kept]
            self.captions = [each[0] for each in texts]
            self.texts = texts if any(len(each) > 1 for each in texts) else None
        self.labels = [labels[i] for i in kept] if labels is not None else None
        self.class_names = listing.class_names if labels is not None else None
        self.counts = counts(self.size, dropped)

    def _ours(self, listing: Listing) -> Sequence[int]:
        """The listed examples of our part of the partition."""
        config, total, labels = self.config, listing.total, listing.labels
        if labels is not None:
            block, self.routing = config.of_classes(len(listing.class_names))
            classes = set(block)
            ours = [i for i in range(total) if labels[i] is None or labels[i] in classes]
        elif listing.captions is not None:
            ours, self.routing = config.of_captions([texts[0] if texts else "" for texts in listing.captions])
        else:
            ours = config.block(total)
        listing.dropped["in other partitions"] += total - len(ours)
        return ours

    def _decode(self, candidates: list[int], dropped: collections.Counter[str]) -> list[int]:
        """The candidates that decode; their pixels stay in memory where they fit, and their bytes are hashed."""
        self._wanted = self.config.sizes()
        each = 3 * self.frames * max(map(math.prod, self._wanted))
        fits = len(candidates) * each <= self.config.memory_gb * 2**30
        self._pixels: list[np.ndarray] | None = [] if fits else None
        kept, told, hashed = [], [], hashlib.sha256()
        main = os.environ.get("LOCAL_RANK", "0") == "0"
        shown = {"desc": "reading images", "unit": "image", "disable": None if main else True, "delay": 1}
        with (
            warnings.catch_warnings(),
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            tqdm(total=len(candidates), **shown) as bar,
        ):
            # Pillow warns of what is counted here.
            warnings.simplefilter("ignore")
            for chunk in _chunks(zip(candidates, self._raw(candidates), strict=True), each):
                results = pool.map(self._decoded, (raw for _, raw in chunk))
                for (i, raw), result in zip(chunk, results, strict=True):
                    if isinstance(result, str):
                        dropped[result] += 1
                        continue
                    if fits:
                        self._pixels.append(result.pixels)
                    kept.append(i)
                    told.append((*result.original, *result.corner, *result.pixels.shape[-3:-1]))
                    hashed.update(hashlib.sha256(raw).digest())
                bar.update(len(chunk))
        if not kept:
            raise UserError(f"data.path={self.config.path} holds no usable image{because(dropped)}.")
        self._digest, self._sizes = hashed.hexdigest(), np.array(told, np.int64)
        return kept

    def _decoded(self, raw: bytes | str) -> Cut | str:
        return decoded(raw, self._wanted, self.config.min_size)

    @functools.cached_property
    def buckets(self) -> Sequence[Bucket]:
        if not self.bucketed:
            return super().buckets
        sizes, which = np.unique(self._sizes[:, 4:], axis=0, return_inverse=True)
        return [
            Bucket((int(height), int(width)), np.flatnonzero(which.reshape(-1) == number))
            for number, (height, width) in enumerate(sizes)
        ]

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        return self._sizes[np.asarray(indices, np.int64)]

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | str]:
        """Encoded bytes of the listed examples (numbers before dropping), in order, or why there are none."""
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> np.ndarray:
        if self._pixels is not None:
            return np.stack([self._pixels[index] for index in indices])
        out: list[np.ndarray | None] = [None] * len(indices)
        listed = np.array([self._kept[index] for index in indices], np.int64)
        # In the order of the files, so that each is read once.
        rows = np.argsort(listed, kind="stable")
        raws = self._raw(listed[rows].tolist())
        for row in rows:
            try:
                result = self._decoded(next(raws))
            except UserError as error:
                raise Unreadable(int(indices[row]), str(error)) from None
            if isinstance(result, str):
                raise Unreadable(
                    int(indices[row]), f"data.path={self.config.path} changed while it was in use: {result}"
                )
            out[row] = result.pixels
        return np.stack(out)

    def fingerprint(self) -> str:
        texts = "\0".join("\n".join(texts) for texts in self.texts or zip(self.captions or ()))
        labels = np.asarray(self.labels, np.int64).tobytes() if self.labels is not None else b""
        return digest([facts(self.config), self._digest, texts, labels])


def class_names(labels: Sequence[int | None], given: Sequence[str], where: str) -> tuple[str, ...]:
    """A name for every class: the `given` ones, or the numbers. Raises UserError where the labels, which lie in `where`,
    reach further than the names, or than any classes do.
    """
    last = max((label for label in labels if label is not None), default=-1)
    if last >= MOST_CLASSES:
        raise UserError(f"data.path: the labels in {where} reach {last:,}; number the classes from 0.")
    if given and len(given) <= last:
        raise UserError(f"data.class_names has {len(given)} names, but the labels in {where} reach {last}.")
    return tuple(given) or tuple(map(str, range(last + 1)))


def _chunks(pairs: Iterable[tuple[int, bytes | str]], each: int) -> Iterator[list[tuple[int, bytes | str]]]:
    """In order, as many at a time as `CHUNK`, `CHUNK_BYTES` and, where they take `each` bytes, `PIXEL_BYTES` allow."""
    most = max(1, min(CHUNK, PIXEL_BYTES // each))
    chunk: list[tuple[int, bytes | str]] = []
    held = 0
    for pair in pairs:
        chunk.append(pair)
        held += len(pair[1])
        if len(chunk) >= most or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
