"""MeanFlow (arXiv 2505.13447): the identity, the gradient, guidance, the flow-map rule."""

from __future__ import annotations

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE, MEAN, STD, Affine, Oracle, batch_of, gradient, nets_of
from worlds import COUNT, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import gaussian_flow_map
from stepdistill.methods.meanflow import Point
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, times_like


@EVERY_SCHEDULE
def test_meanflows_identity_holds_for_the_exact_average_velocity(schedule):
    """u = v - (t - r) du/dt with the oracle's u, through any native schedule: the error is rounding."""
    method = worlds.method("meanflow", equal_share=0.0, time_mean=0.0, time_std=0.8)
    assert float(method.loss(nets_of(schedule), batch_of())["error"].max()) < 1e-7
    assert float(method.loss(nets_of(schedule, Affine()), batch_of())["error"].mean()) > 1e-2


def test_the_oracles_average_velocity_is_the_average():
    """(x_t - x_r) / (t - r) by the flow map, and v itself at r = t."""
    flow = Flow()
    nets = nets_of(flow)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    t, r = times_like(0.8, x), times_like(0.3, x)
    u = nets.student(x, t, end=r).flow
    x_r = gaussian_flow_map(flow, MEAN, STD, x, t, r)
    torch.testing.assert_close(u, (x - x_r) / 0.5, rtol=1e-9, atol=1e-9)
    nearly = nets.student(x, t, end=t - 1e-6).flow
    torch.testing.assert_close(nearly, nets.teacher(x, t).flow, rtol=1e-4, atol=1e-5)


def test_with_r_equal_to_t_meanflow_is_flow_matching():
    method, net = worlds.method("meanflow", direction="data", equal_share=1.0, weight_power=0.0), Affine()
    nets, batch, twin = nets_of(Flow(), net), batch_of(), batch_of()
    losses = method.loss(nets, batch)
    t, r = method.times(nets, twin)
    assert torch.equal(t, r)
    eps = twin.randn()
    x_t = Flow().add_noise(twin.x0, eps, t)
    expected = (nets.student(x_t, t, end=t).flow - (eps - twin.x0)).square()[:, 0]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-9)


def test_meanflows_times_are_ordered_and_its_share_of_equal_times_is_kept():
    method = worlds.method("meanflow", equal_share=0.25)
    t, r = method.times(nets_of(Flow()), batch_of(4000))
    assert bool((r <= t).all()) and abs(float((r == t).double().mean()) - 0.25) < 5 * (0.1875 / 4000) ** 0.5


def test_meanflows_gradient_stops_at_the_target_and_its_weight():
    """2 w (u - target) du with w = (|.|^2 + c)^-p and the target constant."""
    method, net = worlds.method("meanflow", equal_share=0.0, weight_power=0.5, weight_c=0.1), Affine()
    nets, batch, twin = nets_of(Flow(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    t, r = method.times(nets, twin)
    x_t = Flow().add_noise(twin.x0, twin.randn(), t)
    v = nets.teacher(x_t, t).flow
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (nets.student(x_t + s * h * v, t + s * h, end=r).flow for s in (1, -1))
    target = v - (t - r)[:, None] * (ahead - behind) / (2 * h)
    u = nets.student(x_t, t, end=r).flow
    gap = (u - target).detach()
    weight = (gap.square() + 0.1) ** -0.5
    expected = gradient((2 * weight * gap * u).mean(), net)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_meanflows_guided_target_mixes_its_own_velocities():
    class Labelled(Affine):
        def forward(self, x_t, t, cond=None, end=None):
            return super().forward(x_t, t, None, end) + 0.3 * cond[:, None]

    settings = {"direction": "data", "guidance_scale": 2.0, "kappa": 0.5, "cond_dropout": 0.0}
    method = worlds.method("meanflow", **settings)
    nets, batch = nets_of(Flow(), Labelled()), batch_of()
    batch.cond, batch.uncond = torch.ones(COUNT), torch.zeros(COUNT)
    eps, t = torch.randn(COUNT, 1, dtype=torch.float64), times_like(0.4, batch.x0)
    x_t = Flow().add_noise(batch.x0, eps, t)
    with torch.no_grad():
        dropped = torch.arange(COUNT) < 3
        at = Point(x_t, t, t, eps, batch.cond, dropped, {})
        v = method.velocity(nets, batch, at)
        c, u = (nets.student(x_t, t, told, end=t).flow for told in (batch.cond, batch.uncond))
    mixed = 2.0 * (eps - batch.x0) + 0.5 * c - 1.5 * u
    torch.testing.assert_close(v[3:], mixed[3:], rtol=1e-9, atol=1e-9)
    # The official rule where the condition is dropped: at omega 3 a guided target has nine times the variance.
    torch.testing.assert_close(v[:3], (eps - batch.x0)[:3], rtol=1e-12, atol=1e-12)
    # And the mix is a constant: with r = t the gradient is that of (u - v)^2 at u alone.
    method = worlds.method("meanflow", **settings, equal_share=1.0, weight_power=0.0)
    net, twin = nets.student.network, batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    t, _ = method.times(nets, twin)
    eps = twin.randn()
    x_t = Flow().add_noise(twin.x0, eps, t)
    at = Point(x_t, t, t, eps, batch.cond, torch.zeros(COUNT, dtype=torch.bool), {})
    v = method.velocity(nets, batch, at).detach()
    u = nets.student(x_t, t, batch.cond, end=t).flow
    torch.testing.assert_close(ours, gradient((u - v).square().mean(), net), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"direction": "data", "guidance_scale": 2.0}])
def test_meanflows_derivative_is_of_the_network_with_the_dropout_that_is_trained(settings):
    class Draws(Affine):
        def forward(self, x_t, t, cond=None, end=None):
            drawn.append(float(torch.rand(())))
            return super().forward(x_t, t, None, end)

    drawn: list[float] = []
    batch = batch_of()
    batch.cond, batch.uncond = torch.ones(COUNT), torch.zeros(COUNT)
    nets = nets_of(Flow(), Draws())
    nets.teacher.network.forward = lambda x_t, t, cond=None: x_t
    worlds.method("meanflow", **settings).loss(nets, batch)
    assert drawn[-1] == drawn[-2] and len(drawn) == (4 if settings else 2)


@EVERY_SCHEDULE
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_flow_map_rule_with_the_oracle_follows_the_trajectory_exactly(schedule, steps):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = schedule.few_step_grid(steps, first_rho=10.0)
    t = times_like(times[0], x)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    start = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * x
    student = Denoiser(Oracle(schedule), "x0", schedule)
    drawn = Sampling(rule="flowmap").sample(student, start, times, None, t_min=schedule.t_min)
    last, end = times_like(times[-1], x), times_like(schedule.t_min, x)
    before = gaussian_flow_map(schedule, MEAN, STD, start, t, last)
    jump = student(before, last, end=end)
    torch.testing.assert_close(drawn, jump.x0, rtol=0, atol=1e-9)
    exact = gaussian_flow_map(schedule, MEAN, STD, start, t, end)
    torch.testing.assert_close(jump.at(end), exact, rtol=0, atol=1e-9)


def test_meanflow_weighs_the_square_summed_over_a_sample():
    settings = {"direction": "data", "equal_share": 1.0, "cond_dropout": 0.0, "weight_power": 0.5}
    made = world("meanflow", schedule="flow", **settings | {"weight_c": 0.1})
    losses, batch = made.method.loss(made.nets, made.batch()), made.batch()
    t, _ = made.method.times(made.nets, batch)
    eps = batch.randn()
    u = made.nets.student(Flow().add_noise(batch.x0, eps, t), t, batch.cond, end=t).flow
    squared = (u - (eps - batch.x0)).square().sum(1)
    torch.testing.assert_close(losses["total"], squared / (squared + 0.1).sqrt(), rtol=1e-4, atol=1e-6)


@EVERY_SCHEDULE
def test_the_identity_holds_by_differences_where_a_network_knows_no_later_time(schedule):
    """Sampling begins there. A step over the end of a table would move the network's time by half of what is thought."""
    settings = {"equal_share": 0.0, "time_mean": 12.0, "derivative": "difference", "difference_step": 1e-4}
    method, batch = worlds.method("meanflow", **settings), batch_of()
    nets = nets_of(schedule)
    # All at one place, that of the most noise.
    assert len(method.times(nets, batch_of())[0].unique()) == 1
    assert float(method.loss(nets, batch)["error"].max()) < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_c": 0.0},
        {"equal_share": 1.5},
        {"cond_dropout": -0.1},
        {"time_std": -1.0},
        {"end_std": -1.0},
        {"difference_step": -1e-3},
    ],
)
@pytest.mark.parametrize("name", ["meanflow", "imf", "dmf", "anyflow"])
def test_settings_out_of_range_are_refused(name, wrong):
    (key,) = wrong
    place = rf"^method\.{'flow_map.' if name == 'anyflow' else ''}{key} must be "
    with pytest.raises(UserError, match=place):
        worlds.method(name, **({"flow_map": wrong} if name == "anyflow" else wrong))


@pytest.mark.parametrize(
    ("name", "wrong", "place"),
    [
        ("imf", {"interval_low": 0.9, "interval_high": 0.1}, r"method\.interval_low"),
        ("twinflow", {"interval_high": 1.5}, r"method\.interval_low"),
        ("anyflow", {"flow_map": {"interval_low": -0.1}}, r"method\.flow_map\.interval_low"),
        ("twinflow", {"clamp": -1.0}, r"method\.clamp must be at least 0"),
        ("dd2", {"imitation_steps": -5}, r"method\.imitation_steps must be at least 0"),
    ],
)
def test_what_later_flow_maps_and_dd2_cannot_use_is_refused(name, wrong, place):
    with pytest.raises(UserError, match=place):
        worlds.method(name, **wrong)
