"""sCM (arXiv 2410.11081): the tangent, its weights and warm-up, the paper's times."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE, MEAN, STD, Affine, batch_of, gradient, nets_of
from stock import (
    drawn,
    seeded,
    states,
    stock_states,
)
from torch import nn
from worlds import COUNT

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import gaussian
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, times_like
from stepdistill.solvers import SOLVERS


@EVERY_SCHEDULE
@pytest.mark.parametrize("how", ["forward", "difference", "upwind"])
def test_the_tangent_of_the_exact_consistency_function_is_zero(schedule, how):
    method = worlds.method("scm", derivative=how, difference_step=1e-4, time_mean=-0.5, time_std=0.7)
    tolerance = {"forward": 1e-10, "difference": 1e-5, "upwind": 1e-4}[how]
    assert float(method.loss(nets_of(schedule), batch_of())["tangent"].max()) < tolerance
    assert float(method.loss(nets_of(schedule, Affine()), batch_of())["tangent"].min()) > 0.01 * tolerance


def test_a_denoiser_is_not_consistent():
    nets = nets_of(EDM())
    nets.modules["student"] = nets.teacher
    assert float(worlds.method("scm").loss(nets, batch_of())["tangent"].mean()) > 0.02


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_scms_gradient_is_the_limit_of_discrete_consistency(sigma_data):
    """r = 1, no normalisation, u = 0: g = cos(t) df/dt and df = -s sin(t) dF, so the gradient is that of
    |f(x_t) - sg f(x_{t-h})|^2 / h over tan(t), times the prior weight 1 / (s tan t).
    """
    trig, net = TrigFlow(sigma_data), Affine()
    net.sigma_data = sigma_data
    method = worlds.method("scm", normalise=False, time_mean=-0.3, time_std=0.5)
    nets, batch, twin = nets_of(trig, net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch, r=1.0)["total"].mean(), net)
    t = method.times(nets, twin, trig)
    x_t = trig.add_noise(twin.x0, twin.randn(), t)
    h = 1e-5
    velocity = nets.teacher(x_t, t).velocity
    with torch.no_grad():
        before = nets.student(x_t - h * velocity, t - h).x0
    distance = (nets.student(x_t, t).x0 - before).square()[:, 0] / h
    expected = gradient((distance / t.tan() / (sigma_data * t.tan())).mean(), net)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@EVERY_SCHEDULE
@pytest.mark.parametrize("how", ["forward", "difference", "upwind"])
def test_the_tangent_is_zero_at_the_ends_of_the_networks_range_too(schedule, how):
    """Of a table most draws with std 3 lie beyond an end, where time has no derivative: none is taken there."""
    method = worlds.method("scm", derivative=how, difference_step=1e-3, time_mean=-0.5, time_std=3.0)
    tolerance = {"forward": 1e-10, "difference": 3e-3, "upwind": 1e-1}[how]
    if isinstance(schedule, VP):
        tolerance = {"forward": 1e-10, "difference": 1e-5, "upwind": 1e-2}[how]
    assert float(method.loss(nets_of(schedule), batch_of(512))["tangent"].max()) < tolerance


@pytest.mark.parametrize("how", ["forward", "difference", "upwind"])
def test_scms_gradient_is_minus_twice_the_tangent(how):
    """However the derivative is taken: what is regressed to is this pass's own F, moved by g."""

    class Steep(Affine):
        def forward(self, x_t, t, cond=None):
            return super().forward(x_t, t) + self.weight[1] * torch.sin(30 * t[:, None])

    settings = {"learned_weight": False, "normalise": False, "time_mean": 0.0, "time_std": 0.3}
    method, trig = worlds.method("scm", derivative=how, difference_step=3e-2, **settings), TrigFlow()
    nets, batch, twin = nets_of(trig, Steep()), batch_of(), batch_of()
    net = nets.student.network
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    t = method.times(nets, twin, trig)
    x_t = trig.add_noise(twin.x0, twin.randn(), t)
    _, g = method.tangent(nets.student, None, trig, x_t, t, nets.teacher(x_t, t).velocity, 1.0)
    expected = gradient((-2 / trig.rho(t)[:, None] * g * nets.student(x_t, t).F).mean(), net)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_the_tangents_warm_up_and_what_r_leaves_out():
    """At r = 0 only the part without a derivative is left: -cos^2 (s F - dx/dt)."""
    method = worlds.method("scm", warmup=4)
    found = [next(iter(method.phases(step))).terms[0][1].keywords["r"] for step in range(6)]
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    trig, nets = TrigFlow(), nets_of(TrigFlow(), Affine())
    x = torch.randn(COUNT, 1, dtype=torch.float64)
    t, dx = times_like(0.7, x), torch.randn_like(x)
    F, tangent = method.tangent(nets.student, None, trig, x, t, dx, 0.0)
    torch.testing.assert_close(tangent, -(math.cos(0.7) ** 2) * (F - dx), rtol=1e-9, atol=1e-12)


def test_scms_weights_are_optional_and_multiply():
    """e^u w d - u of the paper; w d, and d alone (rCM)."""
    batch, nets = batch_of, nets_of(TrigFlow(), Affine())
    plain = worlds.method("scm", prior=False, learned_weight=False)
    assert plain.networks(nets.teacher, nets.student) == {}
    assert next(iter(plain.phases(0))).trains == ("student",)
    losses = plain.loss(nets, batch())
    assert torch.equal(losses["total"], losses["distance"])
    t = plain.times(nets, batch(), TrigFlow())
    weighed = worlds.method("scm", learned_weight=False).loss(nets, batch())["total"]
    torch.testing.assert_close(weighed, losses["distance"] / t.tan(), rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        nets.weighting.leave.bias.fill_(0.7)
    learned = worlds.method("scm").loss(nets, batch())["total"]
    torch.testing.assert_close(learned, math.exp(0.7) * weighed - 0.7, rtol=1e-5, atol=1e-5)


def test_a_normalised_tangent_makes_the_loss_known_beforehand():
    method = worlds.method("scm", tangent_c=0.1)
    losses = method.loss(nets_of(TrigFlow(), Affine()), batch_of())
    norm = losses["tangent"]
    torch.testing.assert_close(losses["distance"], (norm / (norm + 0.1)) ** 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_scms_times_are_scm_schedulers(steps, sigma_data):
    from diffusers import SCMScheduler

    times = worlds.method("scm", steps=(1, 2, 4), first_rho=0.0).sampling.grid(TrigFlow(sigma_data), steps)
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    torch.testing.assert_close(torch.tensor((*times, 0.0)), scheduler.timesteps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
# Both clamp the last cosine: ours at 1e-4, float32's pi / 2 has its own.
@pytest.mark.parametrize(("first_rho", "tolerance"), [(0.0, 1e-3), (80.0, 2e-6)])
def test_scms_states_are_scm_schedulers(steps, sigma_data, first_rho, tolerance):
    """Every state and the result of the stock scheduler, number by number, with the same network outputs."""
    from diffusers import SCMScheduler

    trig = TrigFlow(sigma_data)
    times = worlds.method("scm", steps=(1, 2, 4), first_rho=first_rho).sampling.grid(trig, steps)
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps, timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None)
    start, outputs = drawn(steps)
    ours = states(outputs, "F", trig, start, times, seeded(start, torch.float32))
    theirs = stock_states(scheduler, [sigma_data * output for output in outputs], start)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_flow_teacher_is_asked_in_trigflow_by_the_papers_formulas():
    """SANA-Sprint's training-free change of network: t, state and F from those of rectified flow."""
    heard = []

    class Velocity(nn.Module):
        def forward(self, x_t, t, cond=None):
            heard.append((x_t, t))
            return torch.sin(3 * x_t) + t[:, None]

    tau = torch.linspace(0.01, 1.55, COUNT, dtype=torch.float64)
    x = torch.randn(COUNT, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    said = Denoiser(Velocity(), "flow", Flow(), TrigFlow())(x, tau).F
    t = tau.sin() / (tau.sin() + tau.cos())
    norm = (t**2 + (1 - t) ** 2).sqrt()[:, None]
    x_flow, t_ = x * norm, t[:, None]
    v = torch.sin(3 * x_flow) + t_
    torch.testing.assert_close(heard[0], (x_flow, t), rtol=1e-12, atol=1e-12)
    expected = ((1 - 2 * t_) * x_flow + (1 - 2 * t_ + 2 * t_**2) * v) / norm
    torch.testing.assert_close(said, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_flow_teachers_trajectories_are_the_same_in_trigflow(solver):
    """100 steps from one noise under either schedule, up to the solver's error, and near the exact end."""
    flow, trig = Flow(), TrigFlow()
    teacher = Denoiser(gaussian(flow, [MEAN], STD), "x0", flow)
    noise, ends = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], []
    for schedule in (flow, trig):
        x, grid = noise, schedule.ode_grid(100)
        for t, s in itertools.pairwise(grid.tolist()):
            x = SOLVERS[solver](teacher.under(schedule), x, times_like(t, x), times_like(s, x))
        ends.append(x)
    tolerance = {"euler": 3e-2, "heun": 1e-3}[solver]
    torch.testing.assert_close(*ends, rtol=0, atol=tolerance)
    torch.testing.assert_close(ends[1], MEAN + STD * noise, rtol=0, atol=tolerance)
