"""BOOT (arXiv 2306.05544): the signal ODE, its boundary, the bootstrap's gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE, MEAN, STD, batch_of, exact
from torch import nn
from worlds import world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import gaussian_flow_map
from stepdistill.methods.base import Networks
from stepdistill.schedule import VP, expand, times_like


def true_signal(schedule, x_first, eps, t):
    """y_t = (x_t - sigma_t eps) / alpha_t on the trajectory of N(MEAN, STD^2) that starts at x_first."""
    first = times_like(schedule.t_max, x_first)
    x_t = gaussian_flow_map(schedule, MEAN, STD, x_first, first, t)
    return (x_t - expand(schedule.sigma(t), x_t) * eps) / expand(schedule.alpha(t), x_t)


@EVERY_SCHEDULE
def test_the_signal_ode(schedule):
    """dy/dt = -lambda'(t) (f - y), by a central difference along the exact trajectory."""
    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x_first = schedule.pure_noise(eps, schedule.t_max)
    for angle in (0.2, 0.8, 1.3):
        t, later, earlier = (
            schedule.t_of_rho(torch.full((9,), math.tan(angle + h), dtype=torch.float64))
            for h in (0, 1e-5, -1e-5)
        )
        ends = [true_signal(schedule, x_first, eps, time) for time in (later, earlier)]
        slope = (ends[0] - ends[1]) / expand(schedule.rho(later).log() - schedule.rho(earlier).log(), eps)
        y = true_signal(schedule, x_first, eps, t)
        x_t = gaussian_flow_map(schedule, MEAN, STD, x_first, times_like(schedule.t_max, eps), t)
        f = exact(schedule)(x_t, t).x0
        # In units of lambda.
        torch.testing.assert_close(slope, -(f - y), rtol=1e-4, atol=1e-5)


@EVERY_SCHEDULE
def test_the_signals_step_is_the_teachers_ddim_step(schedule):
    """y after the step, put back on the trajectory, is DDIM's x_s; an algebraic identity for any y_t."""
    method = worlds.method("boot")
    y_t, eps = torch.randn(2, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = method.times(schedule, batch_of(8))
    x_t = schedule.add_noise(y_t, eps, t)
    said = exact(schedule)(x_t, t)
    ours = schedule.add_noise(method.step(schedule, y_t, said.x0, t, s), eps, s)
    torch.testing.assert_close(ours, said.at(s), rtol=1e-9, atol=1e-9)


class Signal(nn.Module):
    """An oracle student, g(eps, t) = y_t exactly, with a displacement to differentiate by."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.off = schedule, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_first, first, cond=None, end=None):
        schedule = self.schedule
        sigma = 1.0 if isinstance(schedule, VP) else expand(schedule.sigma(first), x_first)
        return true_signal(schedule, x_first, x_first / sigma, end) + self.off


@EVERY_SCHEDULE
def test_the_answer_boot_converges_to_is_the_quantile_map(schedule):
    """Where every bootstrap residual and the boundary's are zero, g(eps, 0) = mean + std eps."""
    method, teacher, delta = worlds.method("boot"), exact(schedule), 2e-3
    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    first = times_like(schedule.t_max, eps)
    x_first = schedule.pure_noise(eps, schedule.t_max)
    # The boundary.
    y, t = teacher(x_first, first).x0, first
    angle = float(schedule.rho(first).atan()[0])
    while angle > 0:
        angle -= delta
        s = times_like(
            max(float(schedule.t_of_rho(torch.tensor(math.tan(max(angle, 0.0))))), schedule.t_min), eps
        )
        x_t = schedule.add_noise(y, eps, t)
        y, t = method.step(schedule, y, teacher(x_t, t).x0, t, s), s
    torch.testing.assert_close(y, true_signal(schedule, x_first, eps, t), rtol=0, atol=0.01)
    # Whose table ends where noise alone is not quite the teacher's x_T.
    if not isinstance(schedule, VP):
        torch.testing.assert_close(y, MEAN + STD * eps, rtol=0, atol=0.01)


@EVERY_SCHEDULE
def test_the_oracles_bootstrap_error_is_that_of_one_ddim_step(schedule):
    """The residual of one step is O(delta^2), so the loss, over delta^2, falls by 4 per halving."""
    nets = Networks(
        {"student": Denoiser(Signal(schedule), "x0", schedule), "teacher": exact(schedule)}, schedule
    )
    losses = []
    for delta in (0.08, 0.04, 0.02):
        method = worlds.method("boot", delta=delta)
        # One place of the trajectory, so that only delta changes.
        t, s = (
            schedule.t_of_rho(torch.full((64,), math.tan(angle), dtype=torch.float64))
            for angle in (0.9, 0.9 - delta)
        )
        method.times = lambda *_, ts=(t, s): ts
        losses.append(float(method.bootstrap(nets, batch_of(64))["total"].mean().detach()))
    assert losses[0] > 1e-9
    for coarse, fine in itertools.pairwise(losses):
        assert 3.4 < coarse / fine < 4.6


def test_the_boundary_is_the_teachers_first_guess_and_where_the_student_begins():
    """A fresh student, told any end, says what it said before it was given one."""
    made = world("boot")
    batch = made.batch()
    x = batch.randn()
    first = times_like(made.nets.schedule.t_max, x)
    fresh = made.family.student("teacher", ("end",))
    plain = made.family.student("teacher", ())
    for end in (0.0, 500.0):
        torch.testing.assert_close(
            fresh(x, first, batch.cond, end=times_like(end, x)).x0, plain(x, first, batch.cond).x0
        )
    # Loss 0 exactly when the student says the teacher's x0 there.
    made.nets.modules["student"] = lambda x_t, t, cond, end: made.nets.teacher(x_t, t, cond)
    assert float(made.method.boundary(made.nets, made.batch())["boundary"].max()) == 0


def test_boot_touches_no_data_and_stops_the_gradient_at_the_target():
    made = world("boot")
    assert not made.method.needs_images and made.batch().x0 is None
    schedule, heard = made.nets.schedule, []
    student = made.nets.student

    class Ear(nn.Module):
        def forward(self, x_t, t, cond, end):
            said = student(x_t, t, cond, end=end)
            heard.append((said, torch.is_grad_enabled(), x_t, t))
            return said

    made.nets.modules["student"] = Ear()
    loss = made.method.bootstrap(made.nets, made.batch())["total"]
    (start, start_grad, x_a, t_a), (reached, reached_grad, x_b, _) = heard
    assert not start_grad and not start.raw.requires_grad and reached_grad and reached.raw.requires_grad
    # The starting noise, twice.
    assert torch.equal(x_a, x_b) and bool((t_a == schedule.t_max).all())
    batch = made.batch()
    eps = batch.randn()
    t, s = made.method.times(schedule, batch)
    f = made.nets.teacher(schedule.add_noise(start.x0, eps, t), t, batch.cond).x0
    ratio = (schedule.rho(s) / schedule.rho(t))[:, None].float()
    target = (1 - ratio) * f + ratio * start.x0
    torch.testing.assert_close(loss, (reached.x0 - target).square().mean(1) / 0.04**2, rtol=1e-4, atol=1e-5)


@EVERY_SCHEDULE
def test_boots_times_are_delta_apart_in_the_angle(schedule):
    method = worlds.method("boot", delta=0.05)
    for step in range(5):
        t, s = method.times(schedule, batch_of(256, step))
        assert bool((s < t).all()) and float(s.min()) >= schedule.t_min and float(t.max()) <= schedule.t_max
        if isinstance(schedule, VP):
            assert torch.equal(t, t.round()) and torch.equal(s, s.round())
        else:
            apart = schedule.rho(t).atan() - schedule.rho(s).atan()
            torch.testing.assert_close(apart, torch.full_like(apart, 0.05), rtol=1e-6, atol=1e-6)


def test_boots_boundary_is_weighed_by_beta():
    (phase,) = worlds.method("boot", boundary_weight=0.3).phases(0)
    assert [weight for weight, _ in phase.terms] == [1.0, 0.3]


def test_boot_refuses_several_steps():
    with pytest.raises(UserError, match=r"student\.steps must be \[1\] for boot"):
        worlds.method("boot", steps=(1, 2))
    with pytest.raises(UserError, match=r"method\.delta must be above 0"):
        worlds.method("boot", delta=0.0)
