"""`python -m evaluation images`: sets of images that exist already, and what to doubt about a distance of two."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.captions import read_captions
from evaluation.decoding import AS_STORED, Resize
from evaluation.extractors import load_extractor
from evaluation.images import IO_BATCH, Facts, open_images
from evaluation.measure import Measurement
from evaluation.protocol import Protocol, get_protocol
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError

# Samples below which published distances are not taken.
FEW = 10_000


def measure_set(
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
    """Measure a set of images, a folder or Parquet file, against another one or its statistics (.npz).

    Args:
        extractor: a name or a directory; None is the protocol's, else inception-2015 for FID and the embedded
            one for everything else.
        protocol: whose image path, extractor and number of samples are used; None is images as they are.
        captions: a file with a caption for every image, in the order of the files' names.
        clip: directory of the CLIP model, where that is not the embedded one.
        io_batch: images decoded by one job; changes nothing but memory.

    Returns values by name, with what they were measured on, and `warnings`. Raises UserError for a set that cannot
    be read, and where a metric needs what is not there.
    """
    chosen = get_protocol(protocol) if protocol is not None else None
    own = open_images(images, chosen.resize if chosen else AS_STORED, io_batch)
    usual = "inception-2015" if "fid" in metrics else "scenes-v1"
    net = load_extractor(extractor or (chosen.extractor if chosen else usual), device)
    if Path(reference).suffix == ".npz":
        against = FeatureStats.load(reference, expect=net.source)
    else:
        against = open_images(reference, reference_resize(chosen), io_batch)
    # Of a protocol only what is done to images counts here: these were drawn already, whatever for.
    bare = replace(chosen, conditions="none", captions=None, images_per_prompt=1) if chosen else None
    said = _captions(captions, chosen, images, len(own))
    ready = Measurement(
        bare, metrics, len(own), extractor=net, reference=against, captions=said, clip=clip or ""
    )
    found = ready.of(own)
    facts, theirs = found.inputs.images.facts, getattr(against, "facts", None)
    reference_n = against.n if isinstance(against, FeatureStats) else len(against)
    warnings = doubts(facts, theirs, len(own), reference_n, net.dim, chosen)
    if Path(images).resolve() == Path(reference).resolve():
        warnings.insert(0, "the images were compared with themselves.")
    return found.numbers | {
        "n": len(own),
        "reference_n": reference_n,
        "extractor": net.name,
        "sha256": net.sha256,
        "resize": net.resize,
        "images_sha256": own.sha256(),
        "protocol": chosen.label(len(own)) if chosen else None,
        "protocol_hash": chosen.hash if chosen else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "warnings": warnings,
    }


def reference_resize(protocol: Protocol | None) -> Resize:
    """How a protocol brings the images of its reference to size; as they are stored where it says nothing."""
    return getattr(protocol.reference, "resize", AS_STORED) if protocol else AS_STORED


def _captions(
    path: str | os.PathLike[str] | None, protocol: Protocol | None, images: object, count: int
) -> list[str] | None:
    if path is None:
        return None
    prefix = protocol.clip_prefix if protocol else ""
    found = [prefix + caption for caption in read_captions(Path(path))]
    if len(found) != count:
        raise UserError(
            f"{path} has {len(found)} captions for the {count} images of {images}; give one each."
        )
    return found


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
