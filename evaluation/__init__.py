"""How good and how fast a sampler is: Fréchet distance, CLIP score, attributes and latency, by protocols.

`evaluate` measures any function that draws images; `run` measures pipeline directories beside their teacher
and writes a report. `FeatureStats` holds the moments of features, `frechet_distance` compares two of them. The
command line is `python -m evaluation --help`.

>>> from evaluation import FeatureStats, evaluate, frechet_distance
>>> frechet_distance(FeatureStats(dim).add(features), FeatureStats.load("ref.npz"))
>>> evaluate(stepdistill.load("assets/student"), "scenes-2k", n=500, metrics=("fd", "clip"))
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.extractors import Extractor
    from evaluation.frechet import frechet_distance
    from evaluation.protocol import Protocol
    from evaluation.stats import FeatureStats

__all__ = ["FeatureStats", "evaluate", "frechet_distance", "run"]


def __getattr__(name: str) -> Any:
    """What needs NumPy and torch is imported when it is first asked for, so that `--help` is quick."""
    if name == "FeatureStats":
        from evaluation.stats import FeatureStats

        return FeatureStats
    if name == "frechet_distance":
        from evaluation.frechet import frechet_distance

        return frechet_distance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def evaluate(
    sampler: Callable[[Sequence[str] | Sequence[int], Sequence[int]], Tensor],
    protocol: str | Protocol = "scenes-2k",
    *,
    n: int | None = None,
    metrics: Sequence[str] = ("fd", "clip", "attributes"),
    extractor: str | Extractor | None = None,
    reference: str | os.PathLike[str] | FeatureStats | None = None,
    captions: str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    classes: int = 0,
    batch: int = 64,
) -> dict[str, Any]:
    """Draw the samples of a protocol and measure them. Prints nothing, and writes nothing that stays.

    Equal pixels give equal numbers whatever `batch` is. Samples beyond a quarter of a gigabyte wait in a
    temporary folder, so that memory doesn't grow with n.

    Args:
        sampler: `sampler(prompts, seeds) -> uint8 (N, 3, H, W)`, one of `stepdistill.load`'s or any other, called
            with up to `batch` of each. Prompts are captions, or class numbers where `reference` is a folder or
            Parquet file.
        protocol: its name, or a `Protocol`.
        n: number of samples; None is the protocol's own. Fewer are marked in the result: "scenes-2k[n=500]".
        metrics: names in `evaluation.metrics.METRICS`. Latency needs a pipeline directory: see `run`.
        extractor: "scenes-v1", a directory, or an `Extractor`; None is the protocol's.
        reference: where the protocol's named reference is; for a protocol without one, a folder or Parquet
            file of real images instead of it (what needs captions cannot then be measured); or statistics
            made by the same extractor.
        captions: where the protocol's captions are, if it has a file of them.
        clip: directory of the protocol's CLIP model, where that is not the embedded one.
        classes: number of classes of a class-conditional sampler; image i has the class i mod `classes`.

    Returns:
        Metric values by name ("fd:scenes-v1", "clip:scenes-v1", "attributes/all", ... and standard errors
        "<name>/se"), with "n" and "protocol".

    Raises:
        UserError: unknown names, n below 2, a reference of another extractor, or images that are not as
            promised.
    """
    from evaluation.extractors import load_extractor
    from evaluation.folders import ROWS_NEEDED
    from evaluation.generate import drawn, kept
    from evaluation.images import ResizedImages
    from evaluation.metrics import get_metrics
    from evaluation.metrics.base import Inputs, check
    from evaluation.metrics.clip_score import ClipScore
    from evaluation.protocol import checked_n, get_protocol, measurable, real_images
    from evaluation.reference import reference_stats
    from evaluation.references import NamedReference
    from evaluation.stats import FeatureStats
    from stepdistill.errors import UserError

    protocol, given = get_protocol(protocol), isinstance(reference, FeatureStats)
    if given:
        protocol = protocol.with_captions(captions)
    elif reference is None or isinstance(protocol.reference, NamedReference):
        protocol = protocol.located(reference, captions)
    else:
        protocol = real_images(reference, classes=classes)
    computed = get_metrics(
        metrics, [name for name in measurable(protocol) if name not in ("latency", "paired")]
    )
    if "clip" in computed and (clip or protocol.clip):
        computed["clip"] = ClipScore(clip, protocol.clip or None)
    n = checked_n(n, protocol)
    inputs = Inputs()
    needs = set().union(*(metric.needs for metric in computed.values()))
    if "extractor" in needs:
        wanted = extractor if extractor is not None else protocol.extractor
        inputs.extractor = load_extractor(wanted) if isinstance(wanted, (str, os.PathLike)) else wanted
    if "reference" in needs:
        inputs.reference = reference if given else reference_stats(protocol, inputs.extractor)
    if "reference_images" in needs and (given or getattr(protocol.reference, "is_statistics", False)):
        raise UserError(
            "a metric that needs the images of the reference was asked for; give them, not statistics."
        )
    inputs.reference_images, inputs.groups = protocol.reference, protocol.groups(n)
    inputs.keep = bool(set(computed) & ROWS_NEEDED)
    prompts, seeds = protocol.prompts(n), protocol.seeds(n)
    inputs.captions = protocol.scored_captions(n)
    check(computed.values(), inputs, n)
    parts = (slice(start, start + batch) for start in range(0, n, batch))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = kept((drawn(sampler, prompts[part], seeds[part]) for part in parts), Path(folder))
        inputs.images = ResizedImages(images, protocol.resize) if protocol.resize else images
        inputs.patch_images = images
        for metric in computed.values():
            found |= metric.compute(inputs)
    return found | {"n": n, "protocol": protocol.label(n)}


def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Measure pipeline directories beside their teacher and write a report; see `evaluation.runner.run`."""
    from evaluation import runner

    return runner.run(*args, **kwargs)
