"""Inception score (Salimans et al. 2016, arXiv 1606.03498): exp E KL(p(y|x) || p(y)), in ten splits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from evaluation.folds import FOLDS, fold_of
from evaluation.metrics.base import Inputs, Metric, blocks
from evaluation.values import Value, measured
from stepdistill.errors import UserError


class InceptionScore(Metric):
    """`is:<extractor>`, higher is better: the mean over ten disjoint splits of the samples.

    Only with an extractor that has logits of one set of classes. `/se` is the standard error of that mean;
    `/std`, the spread over splits, is what papers write behind the ±.
    """

    needs = frozenset({"images", "extractor", "features"})
    values = (Value("is", better="higher", main=True), Value("is/std"))

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError for an extractor without logits and for fewer than ten images."""
        if inputs.extractor.head is None:
            raise UserError(
                f"an Inception score needs a classifier, and {inputs.extractor.name} has no logits of one set of "
                "classes; use --extractor inception-2015."
            )
        if n < FOLDS:
            raise UserError(f"an Inception score in {FOLDS} splits needs at least {FOLDS} images, got {n}.")

    def compute(self, inputs: Inputs) -> list[Value]:
        """Raises UserError as `check` does."""
        self.check(inputs, len(inputs.images))
        head = inputs.extractor.head
        scores = split_scores(head(rows) for rows in blocks(inputs.features))
        numbers = {
            "is": (float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(len(scores)))),
            "is/std": float(scores.std()),
        }
        return measured(self.values, numbers, inputs.extractor.name)


def split_scores(logits: Iterable[np.ndarray], splits: np.ndarray | None = None) -> np.ndarray:
    """The score of each split (10,), from batches of logits (n, classes) in order of index.

    `splits` gives the split of each row; None: those of `evaluation.folds`. With H the entropy, the mean of KL is
    H(mean p) - mean H(p), so the sums of p and of p log p are all that is kept. Raises UserError if a split has no
    row.
    """
    sums: np.ndarray | None = None
    negentropy, counts, at = np.zeros(FOLDS), np.zeros(FOLDS, int), 0
    for batch in logits:
        batch = np.asarray(batch, np.float64)
        shifted = batch - batch.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        p = np.exp(logs)
        index = np.arange(at, at + len(batch))
        fold = fold_of(index) if splits is None else splits[index]
        sums = np.zeros((FOLDS, batch.shape[1])) if sums is None else sums
        np.add.at(sums, fold, p)
        np.add.at(negentropy, fold, (p * logs).sum(axis=1))
        counts += np.bincount(fold, minlength=FOLDS)
        at += len(batch)
    if sums is None or not counts.all():
        raise UserError(f"an Inception score in {FOLDS} splits needs at least {FOLDS} images, got {at}.")
    marginal = sums / counts[:, None]
    logs = np.log(np.where(marginal > 0, marginal, 1))
    return np.exp(negentropy / counts - (marginal * logs).sum(axis=1))
