"""Statistics of a protocol's reference images, computed once and kept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from evaluation.extractors import Extractor
from evaluation.processes import Processes
from evaluation.protocol import Protocol
from evaluation.references import NamedReference, holds
from evaluation.stats import FeatureStats
from stepdistill import assets
from stepdistill.errors import UserError

ENVIRONMENT = "STEPDISTILL_CACHE"
# Counts up when a network's features change in their last bits, as by folding its norms.
_FORM = "2"


def cache_directory() -> Path:
    """Where statistics are kept: $STEPDISTILL_CACHE, else cache/ beside assets/."""
    return Path(os.environ.get(ENVIRONMENT) or assets.ROOT.parent / "cache") / "statistics"


def reference_stats(
    protocol: Protocol, extractor: Extractor, processes: Processes | None = None
) -> FeatureStats:
    """Statistics of the reference images of `protocol`.

    They are cached under the protocol's hash, the content of the reference and the extractor's weights, so nothing
    stale can be found. A cache which cannot be written to is done without. A named reference may be a statistics file
    itself. Raises UserError if the protocol has none, a reference image is damaged or of another size than the others,
    or the statistics are another extractor's or of another number of images.
    """
    processes = processes or Processes()
    reference = protocol.reference
    if reference is None:
        raise UserError(f"the protocol {protocol.name} has no reference images to take a distance to.")
    if isinstance(reference, NamedReference) and "statistics" in holds(reference.path):
        return _given(reference, extractor)
    path = processes.from_first(lambda: _place(protocol, extractor))
    stats = processes.from_first(lambda: _known(path, extractor))
    if stats is None:
        stats = extractor.statistics(reference.resized().watched())
        if processes.first:
            with contextlib.suppress(PermissionError):
                stats.save(path)
    return stats


def _given(reference: NamedReference, extractor: Extractor) -> FeatureStats:
    stats = FeatureStats.load(reference.path, expect=extractor.source)
    # Published files often don't say theirs.
    if stats.n not in (0, reference.n):
        raise UserError(
            f"{reference.path} holds statistics of {stats.n} images, but the reference {reference.name} has "
            f"{reference.n}; {reference.about}"
        )
    return stats


def _place(protocol: Protocol, extractor: Extractor) -> Path:
    content, weights = protocol.reference.sha256()[:16], extractor.sha256[:16]
    name = "-".join((protocol.name.replace(":", "-"), protocol.hash, content, weights, _FORM))
    return cache_directory() / f"{name}.npz"


def _known(path: Path, extractor: Extractor) -> FeatureStats | None:
    """What is kept at `path`, or None. What is damaged there is ours, and removed to be made again."""
    try:
        return FeatureStats.load(path, expect=extractor.source) if path.is_file() else None
    except UserError:
        path.unlink(missing_ok=True)
        return None
