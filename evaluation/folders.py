"""`python -m evaluation images` and `stats`: sets of images that exist already, and what to doubt about them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.captions import read_captions
from evaluation.decoding import Resize, patch_window
from evaluation.extractors import Extractor, load_extractor
from evaluation.images import IO_BATCH, Facts, Images, open_images
from evaluation.metrics import METRICS, get_metrics
from evaluation.metrics.base import Inputs, check
from evaluation.metrics.clip_score import ClipScore
from evaluation.protocol import Protocol, get_protocol
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError

ROWS_NEEDED = {
    "kid",
    "prdc",
    "is",
    "cmmd",
    "diversity",
    "paired",
}  # metrics of features, not of their statistics
FEW = 10_000  # samples below which published distances are not taken
_WHERE_FROM = {
    "captions": "give them with --captions",
    "reference_images": "give --ref a folder or Parquet file, not statistics",
    "timed": "measure it with `python -m evaluation run`",
    "teacher": "measure it with `python -m evaluation run`",
}


def measure(
    images: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    metrics: Sequence[str] = ("fd",),
    extractor: str | os.PathLike[str] | None = None,
    protocol: str | Protocol | None = None,
    captions: str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    io_batch: int = IO_BATCH,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a set of images against another one or its statistics.

    Args:
        images: a folder or Parquet file.
        reference: another, or statistics (.npz) made by the same extractor.
        extractor: a name or a directory; None is the protocol's, else inception-2015 for FID and the embedded
            one for everything else.
        protocol: whose image path, extractor and number of samples are used; None is images as they are.
        captions: a file with a caption for every image, in the order of the files' names.
        clip: directory of the CLIP model, where that is not the embedded one.
        io_batch: images decoded by one job; changes nothing but memory.

    Returns:
        Values by name, with what they were measured on, and `warnings`.

    Raises:
        UserError: a set cannot be read, or a metric needs what is not there.
    """
    chosen = get_protocol(protocol) if protocol is not None else None
    resize = chosen.resize if chosen else Resize()
    own = open_images(images, resize, io_batch)
    computed = get_metrics(metrics, METRICS)
    reference = Path(reference)
    given = {"images", "extractor", "reference"} | ({"captions"} if captions else set())
    if reference.suffix != ".npz":
        given.add("reference_images")
    for name, metric in computed.items():
        if missing := sorted(metric.needs - given):
            raise UserError(
                f"the metric {name!r} needs {' and '.join(missing)}, which is not here; "
                f"{_WHERE_FROM.get(missing[-1], 'leave the metric out')}."
            )
    inputs = Inputs(images=own)
    if "clip" in computed and (clip or (chosen and chosen.clip)):
        computed["clip"] = ClipScore(clip, (chosen.clip if chosen else "") or None)
    if captions:
        prefix = chosen.clip_prefix if chosen else ""
        inputs.captions = [prefix + caption for caption in read_captions(Path(captions))]
        if len(inputs.captions) != len(own):
            raise UserError(
                f"{captions} has {len(inputs.captions)} captions for the {len(own)} images of {images}; "
                "give one each."
            )
    usual = "inception-2015" if "fid" in computed else "scenes-v1"
    net = load_extractor(extractor or (chosen.extractor if chosen else usual), device)
    inputs.extractor = net
    against = (
        None if reference.suffix == ".npz" else open_images(reference, _reference_resize(chosen), io_batch)
    )
    inputs.reference_images = against
    check(computed.values(), inputs, len(own))
    stats = FeatureStats.load(reference, expect=net.source) if against is None else statistics(against, net)
    inputs.reference = stats
    inputs.keep = bool(set(computed) & ROWS_NEEDED)
    if chosen and chosen.patch and "patch-fd" in computed:
        inputs.patch_images = open_images(images, patch_window(chosen.patch), io_batch)
        inputs.patch_reference = open_images(reference, patch_window(chosen.patch), io_batch)
    found: dict[str, Any] = {}
    for metric in computed.values():
        found |= metric.compute(inputs)
    warnings = doubts(own.facts, against.facts if against else None, len(own), stats.n, net.dim, chosen)
    if Path(images).resolve() == reference.resolve():
        warnings.insert(0, "the images were compared with themselves.")
    return found | {
        "n": len(own),
        "reference_n": stats.n,
        "extractor": net.name,
        "sha256": net.sha256,
        "resize": net.resize,
        "images_sha256": own.sha256(),
        "protocol": chosen.label(len(own)) if chosen else None,
        "protocol_hash": chosen.hash if chosen else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "warnings": warnings,
    }


def statistics(images: Images, extractor: Extractor) -> FeatureStats:
    """Feature statistics of a set, in one pass."""
    stats = FeatureStats(extractor.dim, extractor.source)
    for features in extractor.stream(images):
        stats.add(features)
    return stats


def doubts(
    own: Facts | None, reference: Facts | None, n: int, reference_n: int, dim: int, protocol: Protocol | None
) -> list[str]:
    """What a reader of a distance has to know about the two sets it is of."""
    found = []
    if 0 < min(n, reference_n or n) <= dim:
        found.append(
            f"no more images than the {dim} features: the covariance has no full rank and the distance is biased "
            "far upwards."
        )
    elif protocol is None and n < FEW:
        found.append(f"{n} images are few: compare only with distances of as many, which share the bias.")
    if protocol is not None and n != protocol.n:
        found.append(f"{n} images where {protocol.name} has {protocol.n}: compare only with as many.")
    if own is None:
        return found
    if own.duplicates:
        found.append(f"{own.duplicates} of {n} images have the same pixels as another one.")
    if own.grey:
        found.append(f"{own.grey} of {n} images are stored without colour.")
    if reference is None:
        return found
    if own.size != reference.size:
        sizes = " and ".join(f"{width}x{height}" for width, height in (own.size, reference.size))
        found.append(f"the two sets differ in size, {sizes}: resizing alone makes a distance.")
    if bool(own.lossy) != bool(reference.lossy):
        counts = f"{own.lossy} of {n} images and {reference.lossy} of the {reference.n} of the reference"
        found.append(f"{counts} are JPEG: its losses alone make a distance.")
    if reference.duplicates:
        found.append(f"{reference.duplicates} of {reference.n} images of the reference are duplicates.")
    if shared := own.shared_with(reference):
        found.append(f"{shared} different images are in both sets.")
    return found


def _reference_resize(protocol: Protocol | None) -> Resize:
    return getattr(protocol.reference, "resize", Resize()) if protocol else Resize()
