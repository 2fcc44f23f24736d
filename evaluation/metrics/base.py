"""What a metric is: a name in METRICS, what it needs, and `compute`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from evaluation.stats import FeatureStats, FoldedStats

if TYPE_CHECKING:
    from evaluation.extractors import Extractor
    from evaluation.images import Images
    from evaluation.metrics.latency import Timed


@dataclass
class Inputs:
    """What metrics are computed from. Only the fields a metric names in `needs` have to be there.

    images: the samples, in order of index; captions: theirs, one each; extractor and reference: for
    distances; timed: the sampler with its settings, and, when there is one, its teacher after it.
    """

    images: Images | None = None
    captions: Sequence[str] | None = None
    extractor: Extractor | None = None
    reference: FeatureStats | None = None
    timed: Sequence[Timed] = ()

    @functools.cached_property
    def folds(self) -> FoldedStats:
        """Feature statistics of `images`; computed when first asked for."""
        folds = FoldedStats(self.extractor.dim, self.extractor.source)
        for features in self.extractor.stream(self.images):
            folds.add(features)
        return folds


class Metric(Protocol):
    """One file in this package and one line in METRICS."""

    needs: frozenset[str]  # names of fields of Inputs

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """Values by name. A standard error has the name of its value with "/se" appended.

        Raises:
            UserError: the inputs are not what this metric can be computed from.
        """
        ...
