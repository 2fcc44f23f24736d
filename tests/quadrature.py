"""A method on the line: an affine student, a two-mode teacher, and means by quadrature, so that nothing is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import SCHEDULES, Mixture
from stepdistill.methods.base import Batch, Method, Networks
from stepdistill.schedule import Schedule

# The noise level of every comparison.
RHO = 0.7
# The student: x0 = SHIFT + SCALE z.
SHIFT, SCALE = 0.4, 0.8
# Another one.
ELSEWHERE = (-0.6, 0.3)
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", [f() for f in SCHEDULES.values()], ids=list(SCHEDULES))
TWO_STUDENTS = pytest.mark.parametrize("theta", [(SHIFT, SCALE), ELSEWHERE], ids=["wide", "narrow"])


class Nodes:
    """In the place of a batch's noise: the nodes of a product quadrature, so that means are exact.

    The first normal draw is z, the second eps; a lognormal time of std 0 takes a draw of its own in between.
    """

    def __init__(self, z: Tensor, eps: Tensor):
        self.draws = {"z": z, "eps": eps}
        self.queue = ["z", "eps"]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # A time.
        if not shape:
            return torch.zeros(len(self.draws["z"]), dtype=torch.float64)
        return self.draws[self.queue.pop(0)][:, None]

    def shared_randint(self, low: int, high: int) -> int:
        return low


def normal(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under N(0, 1): the trapezoid rule, exponentially exact here."""
    nodes = torch.linspace(-9, 9, count, dtype=torch.float64)
    weights = (-0.5 * nodes**2).exp()
    return nodes, weights / weights.sum()


class Affine(nn.Module):
    """x0 = shift + scale z of the unit noise z its first input was made from."""

    def __init__(self, z_of: Callable[[Tensor, Tensor], Tensor], theta: tuple[float, float] = (SHIFT, SCALE)):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in theta)
        self.z_of = z_of

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.shift + self.scale * self.z_of(x_t, t)


class Line:
    """A method on the line: affine student, two-mode teacher, the exact fake score of the student's law."""

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        theta: tuple[float, float] = (SHIFT, SCALE),
        nodes: int = 161,
        **settings: Any,
    ):
        common = {"time_density": "lognormal", "time_mean": math.log(RHO), "time_std": 0.0}
        self.method = worlds.method(name, steps=(1,), **(common | settings))
        self.schedule = schedule
        self.t = schedule.t_of_rho(torch.tensor([RHO], dtype=torch.float64))
        alpha, sigma = float(schedule.alpha(self.t)), float(schedule.sigma(self.t))
        self.alpha, self.sigma = alpha, sigma
        means = torch.tensor([[-1.0], [1.3]], dtype=torch.float64)
        weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        self.data = Mixture(schedule, means, 0.35, weights)
        first = first_sigma(self.method, schedule)
        self.theta, self.student = theta, Affine(lambda x_t, t: x_t / first, theta)
        modules = {
            "student": Denoiser(self.student, "x0", schedule),
            "teacher": Denoiser(self.data, "x0", schedule),
            "fake_score": Denoiser(self.own(*theta), "x0", schedule),
        }
        self.nets = Networks(modules, schedule)
        z, wz = normal(nodes)
        grid_z, grid_eps = torch.meshgrid(z, z, indexing="ij")
        self.z, self.eps = grid_z.flatten(), grid_eps.flatten()
        self.weights = torch.outer(wz, wz).flatten()

    def own(self, shift: float, scale: float) -> Mixture:
        return Mixture(self.schedule, torch.tensor([[shift]], dtype=torch.float64), scale)

    def batch(self) -> Batch:
        noise = Nodes(self.z, self.eps)
        return Batch(None, None, (1,), torch.arange(len(self.z)), noise)

    def expected(self, name: str = "total") -> Tensor:
        return (self.weights * self.method.student_loss(self.nets, self.batch())[name]).sum()

    def mean(self, name: str) -> float:
        return float(self.expected(name).detach())

    def gradient(self) -> Tensor:
        """d E[loss] / d (shift, scale), through the method's own code."""
        parameters = (self.student.shift, self.student.scale)
        return torch.stack(torch.autograd.grad(self.expected(), parameters))

    def score_gap(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """s_student - s_data at x_t, the student's differentiable in its parameters."""
        variance = self.alpha**2 * scale**2 + self.sigma**2
        own = -(x - self.alpha * shift) / variance
        t = self.t.expand(len(x))
        state = x[:, None] if x.requires_grad else x[:, None].clone().requires_grad_(True)
        (data,) = torch.autograd.grad(self.data.log_prob(state, t).sum(), state, create_graph=True)
        return own - data[:, 0]

    def direct(self, d: Callable[[Tensor], Tensor], sampling: bool) -> Tensor:
        """d / d (shift, scale) of E_{x_t} d(s_student - s_data), the sampling law differentiated or held."""
        shift, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in self.theta)
        nodes, weights = normal(1601)
        spread = (self.alpha**2 * scale**2 + self.sigma**2).sqrt()
        x = self.alpha * shift + spread * nodes
        x = x if sampling else x.detach()
        value = (weights * d(self.score_gap(x, shift, scale))).sum()
        return torch.stack(torch.autograd.grad(value, (shift, scale)))

    def reverse_kl(self) -> Tensor:
        """d KL(student at t || data at t) / d (shift, scale)."""
        return self.density_gradient(lambda log_q, log_p: log_q.exp() * (log_q - log_p))

    def density_gradient(self, integrand: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The same for the integral of any function of the two log densities, by the trapezoid rule."""
        shift, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in self.theta)
        x = torch.linspace(-14, 14, 20001, dtype=torch.float64)
        variance = self.alpha**2 * scale**2 + self.sigma**2
        log_q = -0.5 * (x - self.alpha * shift) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()
        log_p = self.data.log_prob(x[:, None], self.t.expand(len(x)))
        value = torch.trapezoid(integrand(log_q, log_p), x)
        return torch.stack(torch.autograd.grad(value, (shift, scale)))


def first_sigma(method: Method, schedule: Schedule) -> float:
    """What the first input divides into the unit noise it was made from."""
    t = method.sampling.grid(schedule, 1)[0]
    return float(method.sampling.first_input(schedule, torch.ones(1, 1, dtype=torch.float64), t))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
