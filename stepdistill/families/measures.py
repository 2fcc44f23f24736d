"""How far a student's points are from those of an exact mixture: by slices, and mode by mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stepdistill.denoiser import Cond
    from stepdistill.families.toy import Mixture


class Measures:
    """What the family `toy` measures of a student, given as a function from a number to so many points."""

    config: Any
    mixture: Mixture
    encode: Callable[[Sequence[int]], Cond]
    data: Callable[..., Tensor]

    def measures(self) -> dict[str, tuple[Callable[[Callable[[int], Tensor]], float], str]]:
        """By name: the function, and whether lower or higher is better."""
        # By the number of points.
        self._references: dict[int, list[Tensor]] = {}
        return {
            "sw1": (self.sliced_w1, "lower"),
            "modes": (self.modes_covered, "higher"),
            "shares": (self.shares_off, "lower"),
            "trace": (self.trace_off, "lower"),
            "shape": (self.shape_off, "lower"),
        }

    def sliced_w1(self, draw: Callable[[int], Tensor], count: int = 4096, draws: int = 4) -> float:
        """Sliced Wasserstein-1 distance of student samples to exact ones over that of exact ones to each other.

        Class by class; the mean over `draws` samples of `count` points against 10 exact ones. 1 is perfect, give
        or take 0.1. Single pairs of exact samples lie 0.5 to 1.7 times their mean apart: one pair is no floor.
        """
        references = self.references(count)
        found = [self.projected(points) for points in draw(draws * count).split(count)]
        floor = [(a - b).abs().mean() for a, b in itertools.combinations(references, 2)]
        apart = [(a - b).abs().mean() for a, b in itertools.product(found, references)]
        return float(torch.stack(apart).mean() / torch.stack(floor).mean())

    def exact(self, count: int, seed: int) -> Tensor:
        """`count` points of what a student should draw, classes in turn, (count, 2)."""
        return self.data(range(count), seed, self.encode([i % self.config.classes for i in range(count)]))

    def references(self, count: int) -> list[Tensor]:
        if count not in self._references:
            self._references[count] = [self.projected(self.exact(count, seed)) for seed in range(1, 11)]
        return self._references[count]

    def projected(self, points: Tensor, directions: int = 512) -> Tensor:
        """Points (count, 2), classes in turn, sorted along random directions: (classes, directions, n)."""
        noise = torch.Generator().manual_seed(0)
        towards = torch.randn(directions, 2, generator=noise, dtype=torch.float64)
        towards = towards / towards.norm(dim=1, keepdim=True)
        parts = points.detach().double().cpu().unflatten(0, (-1, self.config.classes)).permute(1, 2, 0)
        return (towards @ parts).float().sort(-1).values

    def nearest(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (N, 2) in float64, the mode nearest to each, (N,), and which lie within 4 std of it."""
        points = points.detach().double().cpu()
        distances, nearest = torch.cdist(points, self.mixture.means).min(1)
        return points, nearest, distances < 4 * self.config.std

    def modes_covered(self, draw: Callable[[int], Tensor], count: int = 4096) -> float:
        """How many modes get at least a quarter of their share of `count` samples, within 4 std of them."""
        _, nearest, near = self.nearest(draw(count))
        shares = torch.bincount(nearest[near], minlength=len(self.mixture.means)) / count
        return float((shares >= self.mixture.weights / 4).sum())

    def shares_off(self, draw: Callable[[int], Tensor], count: int = 4096) -> float:
        """Total variation of the modes' shares from their weights, every point counted to the nearest mode: 0 is
        perfect, about 0.016 the mean of `count` exact samples of 8 modes.
        """
        _, nearest, _ = self.nearest(draw(count))
        shares = torch.bincount(nearest, minlength=len(self.mixture.means)) / count
        return float((shares - self.mixture.weights).abs().sum() / 2)

    def covariances(self, draw: Callable[[int], Tensor], count: int) -> Tensor:
        """Of each mode's points within 4 std, over the true one: (modes, 2, 2), the identity where it is right; zero of
        fewer than three points.
        """
        points, nearest, near = self.nearest(draw(count))
        found = [points[near & (nearest == k)] for k in range(len(self.mixture.means))]
        nothing = torch.zeros(2, 2, dtype=torch.float64)
        return (
            torch.stack([each.T.cov() if len(each) > 2 else nothing for each in found]) / self.config.std**2
        )

    def trace_off(self, draw: Callable[[int], Tensor], count: int = 4096) -> float:
        """|trace / true trace - 1| of the modes' covariances, their mean: 0.2 where modes are a tenth too narrow, or too
        wide. About 0.04 for exact samples.
        """
        traces = self.covariances(draw, count).diagonal(dim1=1, dim2=2).mean(1)
        return float((traces - 1).abs().mean())

    def shape_off(self, draw: Callable[[int], Tensor], count: int = 4096) -> float:
        """The difference of the modes' covariances from the true one by Frobenius norm, over that norm, their mean.
        About 0.09 for exact samples.
        """
        difference = self.covariances(draw, count) - torch.eye(2, dtype=torch.float64)
        return float(difference.norm(dim=(1, 2)).mean() / math.sqrt(2))
