"""Fréchet distance of samples' features to a reference's. Named after the extractor: this is not FID."""

from __future__ import annotations

from evaluation.metrics.base import Inputs
from evaluation.stats import frechet_with_error


class FrechetDistance:
    """`fd:<extractor>`, lower is better. Needs at least two images."""

    needs = frozenset({"images", "extractor", "reference"})

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """The distance and its jackknife standard error (see `evaluation.stats`)."""
        value, error = frechet_with_error(inputs.folds, inputs.reference)
        name = f"fd:{inputs.extractor.name}"
        return {name: value, f"{name}/se": error}
