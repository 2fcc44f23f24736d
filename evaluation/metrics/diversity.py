"""How different the images of one prompt are. A student that draws one picture per prompt has a diversity of 0,
and neither a Fréchet distance nor a CLIP score notices.
"""

from __future__ import annotations

import numpy as np

from evaluation.metrics.base import Inputs, Metric
from evaluation.values import Value, measured
from stepdistill.errors import UserError


class Diversity(Metric):
    """`diversity:<extractor>`: mean feature distance of two images of a prompt, averaged over prompts; higher is
    more diverse.

    `/share` is the variance within prompts over that of all samples: 0 where a prompt fixes the picture, 1
    where it says nothing. `/of_teacher`, if the teacher's samples are there, is the distance over the
    teacher's: below 1 modes were lost. Images of one prompt have the same entry in `groups`, or else the same
    caption; prompts with a single image don't count.
    """

    needs = frozenset({"images", "extractor", "features"})
    several = True
    values = (
        Value("diversity", better="higher", main=True),
        Value("diversity/share", better="higher"),
        Value("diversity/of_teacher", better="higher", main=True, compares=True),
    )

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError when no prompt has two images, or groups and images differ in number."""
        members(inputs, n)

    def compute(self, inputs: Inputs) -> list[Value]:
        """Raises UserError as `check` does. A teacher that draws one picture per prompt leaves a doubt, and no ratio."""
        groups = members(inputs, len(inputs.images))
        parts = [np.asarray(inputs.features[index], np.float64) for index in groups]
        distances = np.array([mean_distance(rows) for rows in parts])
        k = len(groups)
        numbers = {"diversity": (float(distances.mean()), _error(distances))}
        count = sum(map(len, parts))
        mean = sum(rows.sum(axis=0) for rows in parts) / count
        total = sum(((rows - mean) ** 2).sum() for rows in parts) / max(count - 1, 1)
        within = sum(((rows - rows.mean(0)) ** 2).sum() for rows in parts)
        numbers["diversity/share"] = float(within / (count - k) / total) if total else 0.0
        if inputs.teacher is not None:
            others = inputs.teacher_features
            theirs = np.array([mean_distance(np.asarray(others[index], np.float64)) for index in groups])
            if not theirs.mean():
                inputs.doubts.append(
                    "the teacher draws one image per prompt, so there is no diversity to compare with."
                )
                return measured(self.values, numbers, inputs.extractor.name)
            ratio = distances.mean() / theirs.mean()
            # Of a ratio of means, to first order (the delta method); prompts are independent.
            error = _error((distances - ratio * theirs) / theirs.mean())
            numbers["diversity/of_teacher"] = (float(ratio), error)
        return measured(self.values, numbers, inputs.extractor.name)


def members(inputs: Inputs, count: int) -> list[np.ndarray]:
    """Indices of the images of each prompt with at least two, of `count` images. Raises UserError if there is no such
    prompt, or groups and images differ in number.
    """
    shown = inputs.groups if inputs.groups is not None else inputs.captions
    if shown is None or len(shown) != count:
        had = "none" if shown is None else f"{len(shown)}"
        raise UserError(f"diversity needs the prompt of each of the {count} images, got {had}.")
    by_group: dict = {}
    for index, group in enumerate(shown):
        by_group.setdefault(group, []).append(index)
    groups = [np.array(index) for index in by_group.values() if len(index) > 1]
    if not groups:
        raise UserError(
            "diversity needs several images of a prompt, and every prompt here has one; use a protocol with "
            "images_per_prompt or a companion, or more samples."
        )
    return groups


def mean_distance(rows: np.ndarray) -> float:
    """Mean Euclidean distance over the pairs of rows (n, dim), n >= 2, from differences."""
    return float(
        np.mean(
            np.concatenate([np.linalg.norm(rows[i + 1 :] - row, axis=1) for i, row in enumerate(rows[:-1])])
        )
    )


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
