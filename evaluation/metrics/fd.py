"""Fréchet distance of samples' features to a reference's. Named after the extractor: this is not FID."""

from __future__ import annotations

from evaluation.metrics.base import Inputs, Metric
from stepdistill.errors import UserError


class FrechetDistance(Metric):
    """`fd:<extractor>`, lower is better. Needs at least two images.

    With it come its jackknife standard error and `fd:<extractor>/infinity`, the distance at infinitely many
    samples, with its own (see `evaluation.folds.FoldDistances`); that one compares across numbers of samples.
    """

    needs = frozenset({"images", "extractor", "reference"})
    called = "fd"

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """The distance, its limit, and their standard errors."""
        found = inputs.distances
        infinity, infinity_error = found.infinity
        name = f"{self.called}:{inputs.extractor.name}"
        return {
            name: found.value,
            f"{name}/se": found.error,
            f"{name}/infinity": infinity,
            f"{name}/infinity/se": infinity_error,
        }


class FID(FrechetDistance):
    """`fid:inception-2015`: the same on features of the 2015 Inception network, and of no other."""

    called = "fid"

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError for another extractor."""
        if not inputs.extractor.name.startswith("inception-2015"):
            raise UserError(
                f"FID is defined by the extractor inception-2015, and {inputs.extractor.name} is in use; "
                "ask for the metric fd, or name --extractor inception-2015."
            )

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """As for `fd`. Raises UserError for another extractor."""
        self.check(inputs, 0)
        return super().compute(inputs)
