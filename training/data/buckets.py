"""Sizes of images by aspect ratio: which there are, which an image goes to, and which the next batch is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# (height, width) in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class Bucket:
    """The examples whose images have one size.

    members: their indices, ascending: a range from 0, or an array.
    """

    size: Size
    members: range | np.ndarray

    def rows(self, indices: Sequence[int]) -> list[int] | None:
        """Where among the members these examples are; None where one is not."""
        if isinstance(self.members, range):
            return list(indices) if all(index in self.members for index in indices) else None
        rows = np.searchsorted(self.members, indices)
        inside = rows.max() < len(self.members) and np.array_equal(self.members[rows], indices)
        return rows.tolist() if inside else None


def bucket_sizes(resolution: Size, step: int, least: int = 0, most: int = 0) -> tuple[Size, ...]:
    """Sizes of at most the area of `resolution`, with sides that are multiples of `step`, a pair of them for each side
    between `least` and `most`: SDXL's (Podell et al. 2023, arXiv 2307.01952, Appendix I) for 1024 pixels and steps of 64.

    least, most: 0 = half and twice the side of a square of that area.

    Raises:
        ValueError: there is none.
    """
    area = math.prod(resolution)
    side = math.isqrt(area)
    least, most = least or side // 2, most or 2 * side
    square = side // step * step
    found = {(square, square)} if least <= square <= most else set()
    for one in range(max(1, math.ceil(least / step)) * step, most + 1, step):
        other = min(area // one, most) // step * step
        if other >= max(least, 1):
            found |= {(one, other), (other, one)}
    if not found:
        raise ValueError(
            f"bucket_reso_steps={step} leaves no size between {least} and {most} pixels of at most {area:,}; make it less."
        )
    return tuple(sorted(found))


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose aspect ratio is nearest to that of height and width, by its logarithm."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / (height / width))))


def next_bucket(seed: int, counts: Sequence[int], drawn: Sequence[int], batch: int) -> int:
    """Which bucket the next global batch is of.

    Each has been owed a share of all samples, this batch's among them, by the number of its examples; one that has had
    less is drawn by chance, the likelier the more it lacks. So all examples are used equally often, but for about a batch
    in each bucket, and phases that take turns do not always meet the same shapes. It depends on nothing but its
    arguments, which a checkpoint holds.

    Args:
        counts: examples of each bucket. drawn: samples drawn of each so far. batch: samples of the batch.
    """
    if len(counts) == 1:
        return 0
    total, after = sum(counts), sum(drawn) + batch
    # In units of 1 / total, so that it is exact.
    lacking = [max(0, count * after - had * total) for count, had in zip(counts, drawn, strict=True)]
    at = np.random.default_rng((seed, sum(drawn))).random() * sum(lacking)
    for number, lack in enumerate(lacking):
        at -= lack
        if at < 0:
            return number
    return max(range(len(lacking)), key=lacking.__getitem__)


def shared_out(samples: int, counts: Sequence[int]) -> list[int]:
    """`samples` over buckets of so many examples, where it is not known how many were drawn of each."""
    edges = [samples * sum(counts[:i]) // sum(counts) for i in range(len(counts) + 1)]
    return [edges[i + 1] - edges[i] for i in range(len(counts))]
