"""Distances between distributions of features that can be trained on. Only training uses them: what judges a student
computes its own (evaluation/), on other networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.jvp import in_full


class Moments(nn.Module):
    """Running means and second moments of generated and real features, float64, by encoder; widths: of their features."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        for i, width in enumerate(widths):
            for whose in ("generated", "real"):
                self.register_buffer(f"{whose}_{i}", torch.zeros(width + 1, width + 1, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64))

    def share(self, memory: float) -> float:
        """Of the present batch: 1 - memory, and more while there were few."""
        return max(1 - memory, 1 / (1 + float(self.updates)))

    def blended(
        self, i: int, generated: Tensor, real: Tensor, memory: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and covariances of both sides with this batch in them: (m, S, m_r, S_r). Gradient through `generated`."""
        share, made = self.share(memory), []
        for whose, features in (("generated", generated), ("real", real)):
            both = (1 - share) * getattr(self, f"{whose}_{i}") + share * _raw_moments(features)
            mean = both[0, 1:]
            made += [mean, both[1:, 1:] - mean[:, None] * mean[None]]
        return made[0], made[1], made[2], made[3]

    @torch.no_grad()
    def update(self, seen: Sequence[tuple[Tensor, Tensor]], memory: float) -> None:
        """seen: generated and real features (N, width) by encoder. A batch that is not finite changes nothing."""
        share = self.share(memory)
        new = {
            f"{whose}_{i}": _raw_moments(features)
            for i, both in enumerate(seen)
            for whose, features in zip(("generated", "real"), both, strict=True)
        }
        finite = torch.stack([each.isfinite().all() for each in new.values()]).all()
        for name, each in new.items():
            kept = getattr(self, name)
            kept.lerp_(torch.where(finite, each, kept), share)
        self.updates += finite


def _raw_moments(features: Tensor) -> Tensor:
    """E [1, f] [1, f]^T, (width + 1, width + 1), float64."""
    rows = torch.cat((features.new_ones(len(features), 1), features), 1).double()
    return rows.T @ rows / len(rows)


def frechet(mean: Tensor, covariance: Tensor, real_mean: Tensor, real_covariance: Tensor) -> Tensor:
    """|m - m_r|^2 + tr S + tr S_r - 2 tr (S_r^1/2 S S_r^1/2)^1/2, with a finite gradient in m and S.

    Directions without spread, of which there are as many as features outnumber samples, have a root of no slope: they are
    left out before the root is taken. (To clamp first and take the root then makes inf 0 = NaN of their gradient.) NaN where
    a moment is not finite, of which no eigenvalues can be taken.
    """
    finite = covariance.isfinite().all() & real_covariance.isfinite().all()
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(torch.where(finite, real_covariance, 0.0))
        half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = half @ torch.where(finite, covariance, 0.0) @ half
    values = torch.linalg.eigvalsh((inner + inner.T) / 2)
    kept = values > 1e-10 * values.detach().max().clamp(min=1e-30)
    roots = torch.where(kept, values, 1.0).sqrt() * kept
    traces = covariance.diagonal().sum() + real_covariance.diagonal().sum()
    return (mean - real_mean).square().sum() + traces - 2 * roots.sum()


def mmd(generated: Tensor, real: Tensor) -> Tensor:
    """The unbiased estimate of MMD^2 of (N, width) and (M, width) under exp(-d^2 / 2 s^2), s the median distance of reals:
    0 in expectation where both are of one distribution, and so below 0 at times. Distances are differences of large products,
    so autocast is off.
    """
    with in_full(generated):
        return _mmd(generated, real)


def _mmd(generated: Tensor, real: Tensor) -> Tensor:
    apart = torch.cdist(real, real).square()
    # Without the diagonal; no mask, whose size is not known without content.
    size = len(real)
    apart = apart.flatten()[1:].view(size - 1, size + 1)[:, :-1]
    width = apart.median().clamp(min=1e-12)

    def kernel(squared: Tensor) -> Tensor:
        return (-squared / (2 * width)).exp()

    # Not by cdist, whose slope is not finite where a distance is 0.
    lengths = generated.square().sum(1)
    own = (lengths[:, None] + lengths[None] - 2 * generated @ generated.T).clamp(min=0)
    other = (lengths[:, None] + real.square().sum(1)[None] - 2 * generated @ real.T).clamp(min=0)
    count = len(generated)
    within = (kernel(own).sum() - kernel(own).diagonal().sum()) / (count * (count - 1))
    return within - 2 * kernel(other).mean() + kernel(apart).mean()
