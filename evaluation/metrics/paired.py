"""A student beside its teacher, image by image, for the same prompts and seeds. Few-step students need not draw
the teacher's very picture (distribution matching does not ask for it); how near they come tells methods apart.
"""

from __future__ import annotations

import numpy as np

from evaluation.folds import frechet_paired_with_error
from evaluation.metrics.base import Inputs, Metric, blocks, folded
from evaluation.metrics.cmmd import unit
from evaluation.values import Value, measured
from stepdistill.errors import UserError


class Paired(Metric):
    """Values named `paired:<extractor>/...`, all with standard errors over images.

    `/distance`: mean squared feature distance of a pair over that of two unrelated images of the teacher
    (twice the trace of its covariance): 0 for the same picture, 1 for another one; lower is nearer. With
    features of DINO or the embedded net this is a perceptual distance.
    `/cosine`: mean cosine of a pair's features; with features of CLIP, the agreement of what is shown.
    `/fd`: Fréchet distance of the samples to the teacher's samples; 0 is possible for equal distributions.
    """

    needs = frozenset({"images", "extractor", "features", "teacher"})
    values = (
        Value("paired/distance", better="lower", main=True),
        Value("paired/cosine", better="higher"),
        Value("paired/fd", better="lower"),
    )

    def compute(self, inputs: Inputs) -> list[Value]:
        """Raises UserError when the two differ in number, or all of the teacher's images are the same."""
        folds = folded(inputs.extractor, features=inputs.teacher_features)
        unrelated = 2 * float(np.trace(folds.total.cov))
        if not unrelated:
            raise UserError(
                "all of the teacher's images have the same features; there is nothing to compare with."
            )
        distances, cosines = [], []
        for own, theirs in zip(blocks(inputs.features), blocks(inputs.teacher_features), strict=True):
            distances.append(((own - theirs) ** 2).sum(1) / unrelated)
            cosines.append((unit(own) * unit(theirs)).sum(1))
        numbers = {
            "paired/distance": _mean(np.concatenate(distances)),
            "paired/cosine": _mean(np.concatenate(cosines)),
            "paired/fd": frechet_paired_with_error(inputs.folds, folds),
        }
        return measured(self.values, numbers, inputs.extractor.name)


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
