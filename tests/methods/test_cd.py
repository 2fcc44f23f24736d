"""CD (arXiv 2303.01469): the solver's local error, the gradient of Eq. 7, the boundary."""

from __future__ import annotations

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE, Affine, Oracle, batch_of, gradient, nets_of
from torch import nn
from worlds import COUNT

from stepdistill.denoiser import Denoiser
from stepdistill.methods.base import consistency
from stepdistill.schedule import EDM, times_like
from stepdistill.solvers import SOLVERS
from stepdistill.timesteps import as_edm


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_cds_loss_at_the_exact_consistency_function_is_the_solvers_local_error(solver, order):
    """Halving the step divides the endpoint error by 2^order: 4 for Euler, 8 for Heun."""
    schedule = EDM()
    nets = nets_of(schedule)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    t = times_like(0.8, x)

    def error(step: float) -> float:
        x_s = SOLVERS[solver](lambda x, s: nets.teacher(x, s), x, t, t - step)
        ahead, here = (consistency(nets.student(a, b)) for a, b in ((x_s, t - step), (x, t)))
        return float((ahead - here).abs().max())

    ratios = [error(h) / error(h / 2) for h in (0.05, 0.025)]
    assert all(abs(ratio - 2**order) < 0.15 * 2**order for ratio in ratios), ratios


@EVERY_SCHEDULE
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cd_is_small_at_the_oracle_and_falls_with_the_number_of_points(schedule, solver):
    def loss(points: int) -> float:
        method, oracle = (
            worlds.method("cd", points=points, solver=solver, link_weight="uniform"),
            Oracle(schedule, as_edm(schedule).t_min),
        )
        return float(method.loss(nets_of(schedule, oracle), batch_of(512))["total"].mean().sqrt())

    coarse, fine = loss(40), loss(160)
    assert fine < coarse / (3.0 if solver == "euler" else 6.0) and coarse < 0.1
    off = (
        worlds.method("cd", points=40, link_weight="uniform")
        .loss(nets_of(schedule, Affine()), batch_of(512))["total"]
        .mean()
        .sqrt()
    )
    assert float(off.detach()) > 3 * coarse


@pytest.mark.parametrize("weight", ["uniform", "inverse_gap"])
def test_cds_gradient_is_the_online_networks_alone(weight):
    """2 w (f(x_t) - f(x_s)) df(x_t)/dtheta, put together again: no gradient through target or teacher."""
    method, net = worlds.method("cd", points=18, link_weight=weight), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)

    grid = EDM().ode_grid(17, "karras")
    n = twin.generator.randint(0, 17)
    t, s = grid[n], grid[n + 1]
    x_t = twin.x0 + t[:, None] * twin.randn()
    d = (x_t - nets.teacher(x_t, t).x0) / t[:, None]
    x_s = x_t + d * (s - t)[:, None]
    d2 = (x_s - nets.teacher(x_s, s).x0) / s[:, None]
    x_s = x_t + (d + d2) / 2 * (s - t)[:, None]
    end = (s <= 0.002)[:, None]
    target = torch.where(end, x_s, nets.target(x_s, s).x0).detach()
    pull = 2 * (nets.student(x_t, t).x0 - target).detach() / COUNT
    if weight == "inverse_gap":
        pull = pull / (t - s).clamp(min=1e-3)[:, None]
    expected = torch.stack([(pull * x_t).sum(), pull.sum(), (pull * t[:, None]).sum()])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@EVERY_SCHEDULE
def test_cds_chain_ends_at_the_state_itself(schedule):
    """With two points every pair ends at the least noise, where f is the state, whatever the target network says."""

    class Wrong(nn.Module):
        def forward(self, x_t, t, cond=None):
            return torch.full_like(x_t, 1e9)

    method, frame = worlds.method("cd", points=2, solver="euler", link_weight="uniform"), as_edm(schedule)
    nets = nets_of(schedule, Affine(), target=Denoiser(Wrong(), "x0", schedule))
    losses, twin = method.loss(nets, batch_of()), batch_of()
    twin.generator.randint(0, 1)
    t, s = (times_like(time, twin.x0) for time in (frame.t_max, frame.t_min))
    x_t = frame.add_noise(twin.x0, twin.randn(), t)
    x_s = SOLVERS["euler"](nets.teacher.under(frame), x_t, t, s)
    expected = (nets.student.under(frame)(x_t, t).x0 - x_s).square()[:, 0]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-12)
