"""Fréchet distance of samples' features to a reference's. Named after the extractor: this is not FID."""

from __future__ import annotations

from evaluation.metrics.base import Inputs, Metric
from evaluation.values import Value, measured
from stepdistill.errors import UserError


class FrechetDistance(Metric):
    """`fd:<extractor>`, lower is better. Needs at least two images.

    With it come its jackknife standard error and `fd:<extractor>/infinity`, the distance at infinitely many
    samples, with its own (see `evaluation.folds.FoldDistances`); that one compares across numbers of samples.
    """

    needs = frozenset({"images", "extractor", "reference"})
    values = (
        Value("fd", better="lower", main=True),
        Value("fd/infinity", better="lower", main=True),
        # A student's over its teacher's, where both were measured, and of how many samples.
        Value("fd_ratio", better="lower", main=True, compares=True),
        Value("fd_ratio/n", compares=True),
    )

    def compute(self, inputs: Inputs) -> list[Value]:
        """The distance, its limit, and their standard errors."""
        distances, name = inputs.distances, self.values[0].name
        numbers = {name: (distances.value, distances.error), f"{name}/infinity": distances.infinity}
        return measured(self.values, numbers, inputs.extractor.name)


class FID(FrechetDistance):
    """`fid:inception-2015`: the same on pooled features of the 2015 Inception network, and of no other. On its
    spatial features, `fd:inception-2015-spatial` is what papers call sFID.
    """

    values = (Value("fid", better="lower", main=True), Value("fid/infinity", better="lower", main=True))

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError for another extractor."""
        name = inputs.extractor.name
        if not name.startswith("inception-2015") or name.endswith("-spatial"):
            raise UserError(
                f"FID is defined by the extractor inception-2015, and {inputs.extractor.name} is in use; "
                "ask for the metric fd, or name --extractor inception-2015."
            )

    def compute(self, inputs: Inputs) -> list[Value]:
        """As for `fd`. Raises UserError for another extractor."""
        self.check(inputs, 0)
        return super().compute(inputs)
