"""Fréchet distance of centre crops at full resolution: it sees the detail that resizing takes away.

For large images, where the network's input is smaller than the image (patch-FID; SDXL-Lightning, arXiv
2402.13929, and DMD2, arXiv 2405.14867).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from evaluation.extractors import Extractor
from evaluation.folds import fold_distances
from evaluation.metrics.base import Inputs, Metric, folded
from evaluation.stats import FeatureStats
from evaluation.values import Value, measured
from stepdistill.errors import UserError


class PatchDistance(Metric):
    """`patch-fd:<extractor>`, lower is better, of the centre of every image, as large as the network's input."""

    needs = frozenset({"images", "extractor", "reference_images"})
    values = (Value("patch-fd", better="lower", main=True),)

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError for an extractor of images of any size."""
        of_patches(inputs.extractor)

    def compute(self, inputs: Inputs) -> list[Value]:
        """The distance and its jackknife error. Raises UserError for images no larger than a patch."""
        patches = of_patches(inputs.extractor)
        own = folded(patches, inputs.patch_images or inputs.images)
        reference = inputs.patch_reference or inputs.reference_images
        if not isinstance(reference, FeatureStats):
            reference = folded(patches, reference).total
        distances = fold_distances(own, reference)
        return measured(self.values, {"patch-fd": (distances.value, distances.error)}, patches.name)


def of_patches(extractor: Extractor) -> Extractor:
    """The extractor on the centre of an image; its statistics are marked as such. Raises UserError if the extractor
    does not say how large its network's input is.
    """
    side = extractor.side
    if not side:
        raise UserError(f"{extractor.name} takes images of any size, so there are no patches to take.")

    def network(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < side:
            raise UserError(
                f"patches of {side}x{side} need images as large, got {width}x{height}; leave patch-fd out, or name a "
                "protocol, which resizes such images as its source does."
            )
        # As torchvision's centre crop, which the source uses.
        top, left = (round((length - side) / 2) for length in (height, width))
        return extractor.network(images[..., top : top + side, left : left + side].contiguous())

    return replace(extractor, network=network, resize=f"none, centre crop of {side}")
