"""ECT (arXiv 2406.14548): its mapping, its pairs, the gradient that stops at the target."""

from __future__ import annotations

import pytest
import torch
import worlds
from gaussians import Affine, batch_of, gradient, nets_of
from torch import nn
from worlds import COUNT

from stepdistill.schedule import EDM


def test_ects_mapping_is_the_papers():
    method = worlds.method("ect")
    # For data of deviation 0.5.
    t = torch.tensor([0.5, 1.0, 3.0, 80.0], dtype=torch.float64)
    first, last = method.ratio(t, 0, 0.5), method.ratio(t, 7, 0.5)
    # Half of the noise hides data half as wide alike.
    torch.testing.assert_close(method.ratio(2 * t, 0), first)
    torch.testing.assert_close(first, torch.tensor([0.0, 0.0, 0.3103, 0.5]).double(), rtol=0, atol=1e-3)
    assert float(last.min()) > 0.98 and float(last[-1]) == pytest.approx(255 / 256)
    for stage in range(7):
        assert bool((method.ratio(t, stage, 0.5) <= method.ratio(t, stage + 1, 0.5)).all())


def test_ects_stage_follows_the_updates():
    method = worlds.method("ect", double_every=10, stages=3)
    found = [next(iter(method.phases(step))).terms[0][1].keywords["stage"] for step in (0, 9, 10, 29, 1000)]
    assert found == [0, 0, 1, 2, 2]


def test_ect_begins_as_denoising_towards_the_data():
    """Where r is 0 the target is x0 itself and the loss |f - x0| / t."""
    method, net = worlds.method("ect", time_mean=-3.0, time_std=0.5), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    losses = method.loss(nets, batch, stage=0)
    t = (-3 + 0.5 * twin.generator.randn(dtype=torch.float64)).exp().clamp(0.002, 80)
    x_t = twin.x0 + t[:, None] * twin.randn()
    expected = (nets.student(x_t, t).x0 - twin.x0).abs()[:, 0] / t
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-9)
    assert float(losses["ratio"]) == 0


def test_ects_pair_shares_its_noise_and_the_oracle_is_its_fixed_point_with_the_teacher():
    """With data pairs the loss of the exact consistency function stays finite (each pair leaves the
    trajectory); with the teacher's own step it is the solver's error, far below.
    """
    nets = nets_of(EDM())
    data = worlds.method("ect").loss(nets, batch_of(2000), stage=7)["total"].mean()
    ode = worlds.method("ect", teacher_step=True).loss(nets, batch_of(2000), stage=7)["total"].mean()
    assert float(ode) < 0.05 * float(data)


def test_ects_gradient_stops_at_the_target():
    """sign(f(x_t) - f(x_r)) / (t - r) df(x_t)/dtheta, put together again from the batch's draws."""
    method, net = worlds.method("ect"), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch, stage=4)["total"].mean(), net)
    t = (-0.407 + 2.0 * twin.generator.randn(dtype=torch.float64)).exp().clamp(0.002, 80)
    r = t * method.ratio(t, 4)
    assert float((r > 0.002).double().mean()) > 0.5
    r = torch.where(r > 0.002, r, 0.0)
    eps = twin.randn()
    x_t, x_r = twin.x0 + t[:, None] * eps, twin.x0 + r[:, None] * eps
    target = torch.where(r[:, None] > 0, nets.student(x_r, r).x0, x_r)
    pull = ((nets.student(x_t, t).x0 - target).sign() / (t - r)[:, None]).detach() / COUNT
    expected = torch.stack([(pull * x_t).sum(), pull.sum(), (pull * t[:, None]).sum()])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_ect_at_a_perfect_fit_has_a_zero_gradient_not_a_nan():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x_t, t, cond=None):
            return self.value.expand_as(x_t)

    net = Constant()
    loss = worlds.method("ect", time_mean=1.0, time_std=0.1).loss(nets_of(EDM(), net), batch_of(), stage=7)[
        "total"
    ]
    assert gradient(loss.mean(), net).tolist() == [0.0]
