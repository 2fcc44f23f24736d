"""Statistics of a protocol's reference images, computed once and kept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from evaluation.extractors import Extractor
from evaluation.protocols import Protocol
from evaluation.stats import FeatureStats
from stepdistill import assets
from stepdistill.errors import UserError

ENVIRONMENT = "STEPDISTILL_CACHE"


def cache_directory() -> Path:
    """Where statistics are kept: $STEPDISTILL_CACHE, else cache/ beside assets/."""
    return Path(os.environ.get(ENVIRONMENT) or assets.ROOT.parent / "cache") / "statistics"


def reference_stats(protocol: Protocol, extractor: Extractor) -> FeatureStats:
    """Statistics of the reference images of `protocol`.

    They are cached under the protocol's hash, the content of the reference and the extractor's weights, so
    nothing stale can be found. A cache which cannot be written to is done without.

    Raises:
        UserError: a reference image is damaged or of another size than the others.
    """
    parts = (
        protocol.name.replace(":", "-"),
        protocol.hash,
        protocol.reference.sha256()[:16],
        extractor.sha256[:16],
    )
    path = cache_directory() / f"{'-'.join(parts)}.npz"
    if path.is_file():
        try:
            return FeatureStats.load(path, expect=extractor.source)
        except UserError:
            path.unlink(missing_ok=True)  # damaged; the file is ours and is made again below
    stats = FeatureStats(extractor.dim, extractor.source)
    for features in extractor.stream(protocol.reference):
        stats.add(features)
    with contextlib.suppress(PermissionError):
        stats.save(path)
    return stats
