"""How good and how fast a sampler is: Fréchet distance, CLIP score, attributes and latency, by protocols.

`evaluate` measures any function that draws images; `run` measures pipeline directories beside their teacher
and writes a report. `FeatureStats` holds the moments of features, `frechet_distance` compares two of them. The
command line is `python -m evaluation --help`.

>>> from evaluation import FeatureStats, evaluate, frechet_distance
>>> frechet_distance(FeatureStats(dim).add(features), FeatureStats.load("ref.npz"))
>>> evaluate(stepdistill.load("assets/student"), "scenes-2k", n=500, metrics=("fd", "clip"))
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.settings import Place

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.extractors import Extractor
    from evaluation.frechet import frechet_distance
    from evaluation.protocol import Protocol
    from evaluation.stats import FeatureStats

__all__ = ["FeatureStats", "evaluate", "frechet_distance", "run"]
_LATER = {"FeatureStats": "evaluation.stats", "frechet_distance": "evaluation.frechet"}


def __getattr__(name: str) -> Any:
    """What needs NumPy and torch is imported when it is first asked for, so that `--help` is quick."""
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def evaluate(
    sampler: Callable[[Sequence[str] | Sequence[int], Sequence[int]], Tensor], protocol: str | Protocol = "scenes-2k",
    *, n: int | None = None, metrics: Sequence[str] = ("fd", "clip", "attributes"),
    extractor: str | Extractor | None = None, reference: Place | FeatureStats | None = None,
    captions: Place | None = None, clip: Place | None = None, classes: int = 0, batch: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """Draw the samples of a protocol and measure them. Prints nothing, and writes nothing that stays.

    Equal pixels give equal numbers whatever `batch` is. Samples beyond a quarter of a gigabyte wait in a
    temporary folder, so that memory doesn't grow with n.

    Args:
        sampler: `sampler(prompts, seeds) -> uint8 (N, 3, H, W)`, one of `stepdistill.load`'s, at fixed settings
            (`sampler.at(steps=1)`) or any other function, called with up to `batch` of each. Prompts are
            captions, or class numbers where `reference` is a folder or Parquet file and comes without captions.
        protocol: its name, or a `Protocol`.
        n: number of samples; None is the protocol's own. Fewer are marked in the result: "scenes-2k[n=500]".
        metrics: names in `evaluation.metrics.METRICS`. Latency needs a pipeline directory: see `run`. Diversity is of
            the protocol's companion, if it names one, for which more samples are drawn.
        extractor: "scenes-v1", a directory, or an `Extractor`; None is the protocol's.
        reference: where the protocol's named reference is; for a protocol without one, a folder or Parquet
            file of real images instead of it; or statistics made by the same extractor.
        captions: where the protocol's captions are, if it has a file of them; or, with `reference`, those that
            samples are drawn for.
        clip: directory of the protocol's CLIP model, where that is not the embedded one.
        classes: number of classes of a class-conditional sampler; image i has the class i mod `classes`.

    Returns:
        Metric values by name ("fd:scenes-v1", "clip:scenes-v1", "attributes/all", ... and standard errors
        "<name>/se"), with "n", "warnings" and "protocol", whose name says what is not as the protocol fixes it.

    Raises:
        UserError: unknown names, n below 2, a reference of another extractor, or images that are not as
            promised.
    """
    from evaluation.measure import measure
    from evaluation.protocol import chosen_protocol, get_protocol
    from evaluation.stats import FeatureStats

    given = reference if isinstance(reference, FeatureStats) else None
    if given is not None:
        chosen = get_protocol(protocol).with_captions(captions)
    else:
        chosen = chosen_protocol(protocol, reference, captions, classes=classes)
    done = measure(
        sampler, chosen, metrics, n=n, extractor=extractor, reference=given, clip=clip or "", batch=batch
    )
    return done.numbers | {"n": done.n, "protocol": done.protocol.label(done.n), "warnings": done.doubts}


def run(
    pipelines: Sequence[Place], out: Place, *, bar: Callable[..., Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Measure pipeline directories beside their teacher and write a report into `out`.

    `settings` are those of `evaluation.settings.Settings`. Returns what is written to results.json.
    """
    from evaluation.runs import run
    from evaluation.settings import Settings

    return run(Settings(pipelines=pipelines, out=out, **settings), bar)
