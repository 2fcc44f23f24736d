"""What a metric is: a name in METRICS, what it needs, and `compute`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from evaluation.folds import FoldDistances, FoldedStats, fold_distances
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from evaluation.extractors import Extractor
    from evaluation.images import Images
    from evaluation.values import Value

# Bytes of features beyond which they are kept in a temporary file.
_IN_MEMORY = 256 << 20


@dataclass
class Inputs:
    """What metrics are computed from. Only the fields a metric names in `needs` have to be there.

    images: the samples, in order of index; captions: theirs, one each; extractor and reference: for
    distances; reference_images: the reference itself, for what cannot be computed from its statistics. teacher: the
    teacher's samples of the same prompts and seeds, row by row. groups: what was drawn for the same prompt has
    the same entry; None: the same caption. patch_images, patch_reference: patches of the two sets at full
    resolution; None: `images` and `reference_images`. clip_images: as a CLIP score wants them, and drawn: as they were
    before a protocol resized them; None: `images`. clip_prefix: what a CLIP score puts before every caption. keep: keep
    the features of `images` in the first pass, because a metric that is computed later needs the rows; without
    it they are extracted once more. doubts: what metrics have to say of their values.
    """

    images: Images | None = None
    captions: Sequence[str] | None = None
    extractor: Extractor | None = None
    reference: FeatureStats | None = None
    reference_images: Images | None = None
    teacher: Images | None = None
    groups: Sequence[Hashable] | None = None
    patch_images: Images | None = None
    patch_reference: Images | FeatureStats | None = None
    clip_images: Images | None = None
    drawn: Images | None = None
    clip_prefix: str = ""
    keep: bool = False
    doubts: list[str] = field(default_factory=list)

    @functools.cached_property
    def folds(self) -> FoldedStats:
        """Feature statistics of `images`; computed when first asked for."""
        known = self.keep or "features" in self.__dict__
        return folded(self.extractor, None if known else self.images, self.features if known else None)

    @functools.cached_property
    def distances(self) -> FoldDistances:
        """Fréchet distances of `images` and of all but a fold of them to `reference`."""
        return fold_distances(self.folds, self.reference)

    @functools.cached_property
    def features(self) -> np.ndarray:
        """Features of `images`, float32 (N, dim), by index."""
        return stored(self.extractor, self.images, "the samples")

    @functools.cached_property
    def reference_features(self) -> np.ndarray:
        """Features of `reference_images`, float32 (M, dim)."""
        return stored(self.extractor, self.reference_images, "the reference")

    @functools.cached_property
    def teacher_features(self) -> np.ndarray:
        """Features of `teacher`, float32 (N, dim); row i belongs to row i of `features`. Raises UserError if there are
        not as many as there are samples.
        """
        rows = stored(self.extractor, self.teacher, "the teacher's samples")
        if len(rows) != len(self.features):
            raise UserError(
                f"a comparison with the teacher needs its image for every sample, got {len(rows)} for "
                f"{len(self.features)}; draw both for the same prompts and seeds."
            )
        return rows


class Metric:
    """What all metrics derive from. Each is one file in this package and one line in METRICS.

    needs: names of fields of `Inputs`, "features" where the rows themselves are looked at and not only their statistics,
    "timed" for what is of no set. values: what it gives, as `Value`s without numbers (see `evaluation.values.measured`).
    several: whether it looks at several images of a prompt.
    """

    needs: frozenset[str]
    values: tuple[Value, ...]
    several: bool = False

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError for what this cannot be computed from, before the n samples are drawn.

        `inputs` holds everything but images and what is made of them.
        """

    def compute(self, inputs: Inputs) -> list[Value]:
        """The values that can be had from `inputs`. Raises UserError if the inputs are not what this metric can be
        computed from.
        """
        raise NotImplementedError


def folded(
    extractor: Extractor, images: Images | None = None, features: np.ndarray | None = None
) -> FoldedStats:
    """Statistics in folds of a set of images, or of its features (N, dim) where they are known."""
    folds = FoldedStats(extractor.dim, extractor.source)
    for rows in extractor.stream(images) if features is None else blocks(features):
        folds.add(rows)
    return folds


def stored(extractor: Extractor, images: Images, what: str) -> np.ndarray:
    """Features of `images`, float32 (N, dim): in memory, or mapped from a temporary file when they are many. Raises
    UserError if there are fewer than two images, or features are NaN or infinite; `what` names the set.
    """
    shape = (len(images), extractor.dim)
    if shape[0] < 2:
        raise UserError(f"{what} must be at least 2 images, got {shape[0]}.")
    if 4 * shape[0] * shape[1] <= _IN_MEMORY:
        rows = np.empty(shape, np.float32)
    else:
        # The mapping keeps the file until it is let go.
        with tempfile.TemporaryFile(prefix="features-") as file:
            rows = np.memmap(file, np.float32, "w+", shape=shape)
    at = 0
    for part in extractor.stream(images):
        part = part.numpy()
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the features of image {at + int(finite.argmin())} of {what} are NaN or infinite; "
                "look at that image."
            )
        rows[at : at + len(part)] = part
        at += len(part)
    return rows


def blocks(rows: np.ndarray, size: int = 1000):
    """Parts of `rows`, of up to `size` in order, in float64."""
    for start in range(0, len(rows), size):
        yield np.asarray(rows[start : start + size], dtype=np.float64)
