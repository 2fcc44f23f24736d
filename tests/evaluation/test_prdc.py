"""Precision, recall, density and coverage against comparisons of all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import rows

from evaluation.metrics import prdc
from stepdistill.errors import UserError


def prdc_by_pairs(x, y, k: int, k_wide: int) -> dict[str, float]:
    x, y = x.astype(np.float64), y.astype(np.float64)

    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(2)

    real, real_wide = (np.sort(distances(y, y), 1)[:, i] for i in (k, k_wide))
    sample = np.sort(distances(x, x), 1)[:, k]
    cross = distances(x, y)
    return {
        "precision": (cross <= real).any(1).mean(),
        "recall": (cross <= sample[:, None]).any(0).mean(),
        "density": (cross <= real_wide).sum(1).mean() / k_wide,
        "coverage": (cross <= real_wide).any(0).mean(),
    }


def lattice(n: int, seed: int) -> np.ndarray:
    """Points with many exact ties and duplicates, far from zero."""
    return np.random.default_rng(seed).integers(0, 3, (n, 4)).astype(np.float32) + 1000


def two_clusters(seed: int) -> np.ndarray:
    """So narrow and so far apart that the round-off of matrix products puts neighbours in a wrong order."""
    return 1e-4 * rows(60, 4, seed).astype(np.float64) + np.where(np.arange(60) % 2, 1e4, -1e4)[:, None]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (rows(90), rows(70, seed=1, shift=0.5)),
        (rows(60), rows(60)),
        (lattice(80, 1), lattice(60, 2)),
        # Nearly all are duplicates.
        (lattice(25, 1)[:, :1], lattice(40, 2)[:, :1]),
        (rows(8), rows(6, seed=1)),
        (rows(40) * 1e-3 + 1e4, rows(50, seed=1) * 1e-3 + 1e4),
        (two_clusters(1), two_clusters(2)),
    ],
)
def test_prdc_decides_as_all_pairs_do(x, y, block: int) -> None:
    found = prdc.prdc(x, y)
    truth = prdc_by_pairs(x, y, 3, 5)
    assert {name: found[name] for name in truth} == {
        name: pytest.approx(value) for name, value in truth.items()
    }


def test_prdc_of_real_vectors_that_are_not_float32() -> None:
    """0.1 has no exact square: only a comparison of differences finds the tie."""
    x = np.array([[0.1 * i, 0.3] for i in range(20)])
    y = np.array([[0.1 * i + 0.1, 0.3] for i in range(20)])
    truth = prdc_by_pairs(x, y, 3, 5)
    found = prdc.prdc(x, y)
    # Centring rounds, so the truth is that of centred points.
    mean = y.mean(0)
    centred = prdc_by_pairs(x - mean, y - mean, 3, 5)
    assert {name: found[name] for name in truth} == {name: pytest.approx(v) for name, v in centred.items()}


def test_prdc_agrees_with_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = rows(150), rows(130, seed=1, shift=0.4)
    precision, recall = metric.calculate_precision_recall_part(
        torch.from_numpy(x).double(), torch.from_numpy(y).double(), neighborhood=3, batch_size=64
    )
    found = prdc.prdc(x, y)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), abs=1e-6)


def test_recall_falls_on_mode_drop_while_precision_stays() -> None:
    centres = 20 * np.eye(6, dtype=np.float32)

    def modes(count: int, n: int, seed: int) -> np.ndarray:
        return rows(n, 6, seed) + centres[np.arange(n) % count]

    real = modes(6, 240, 1)
    found = [prdc.prdc(modes(count, 240, 2), real) for count in (6, 4, 2, 1)]
    recalls, precisions = ([one[name] for one in found] for name in ("recall", "precision"))
    assert recalls == sorted(recalls, reverse=True) and recalls[-1] < 0.3 * recalls[0]
    assert min(precisions) > 0.9 * precisions[0]
    noisy = prdc.prdc(modes(6, 240, 2) + 3 * rows(240, 6, 9), real)
    assert noisy["precision"] < 0.3 * precisions[0] and noisy["recall"] > 0.9 * recalls[0]


def test_prdc_wants_more_images_than_neighbours() -> None:
    with pytest.raises(UserError, match="more than 5 images on each side, got 5"):
        prdc.prdc(rows(5), rows(20))
