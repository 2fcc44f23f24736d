"""TwinFlow (arXiv 2512.05150): one network, its twin, the direction of its one-step answers."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import worlds
from worlds import world

from stepdistill.errors import UserError
from stepdistill.methods.base import Networks

PLAIN = {"guidance_high": 1.0, "tell_guidance": False}


def test_there_is_one_network():
    made = world("twinflow")
    assert set(made.nets.modules) == {"student"}
    (phase,) = made.method.phases(0)
    assert phase.trains == ("student",) and [weight for weight, _ in phase.terms] == [1.0, 1.0, 0.5]
    with pytest.raises(UserError, match=r"method\.direction"):
        worlds.method("twinflow", direction="teacher")


class Shifted(torch.nn.Module):
    """Data at the origin; asked for its twin, samples at 0.4; a jump ends at `answer`."""

    def __init__(self):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.tensor([[0.4, 0.4]]))

    def forward(self, x_t, t, cond=None, end=None, guidance=None):
        twin, still = (end == 1.0)[:, None], (end == t)[:, None]
        return torch.where(twin, 0.4, torch.where(still, 0.0, self.answer)).expand_as(x_t)


@pytest.mark.parametrize("clamp", [0.0, 0.1])
def test_the_one_step_answer_goes_from_its_own_law_to_the_datas(clamp):
    made = world("twinflow", schedule="flow", first_rho=50.0, clamp=clamp, **PLAIN)
    net = Shifted()
    made.nets.student.network = net
    made.nets.student.kind = "x0"
    losses = made.method.twin_loss(made.nets, made.batch())
    losses["total"].mean().backward()
    # Down the loss is towards the origin.
    assert bool((net.answer.grad > 0).all())
    if not clamp:
        free = net.answer.grad.clone()
        net.answer.grad = None
        world_clamped = worlds.method("twinflow", first_rho=50.0, clamp=0.1, **PLAIN)
        world_clamped.twin_loss(made.nets, made.batch())["total"].mean().backward()
        assert bool((net.answer.grad.abs() < free.abs()).all())


def test_only_the_one_step_answer_has_a_gradient():
    made = world("twinflow", schedule="flow", **PLAIN)
    calls = []
    made.nets.student.register_forward_hook(lambda *call: calls.append(call[-1].raw.requires_grad))
    made.method.twin_loss(made.nets, made.batch())
    assert calls == [True, False, False]
    calls.clear()
    made.method.own_loss(made.nets, made.batch())
    assert calls == [False, True]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_real_and_fake_velocity_are_learned_by_the_same_loss(power):
    """Or else they would differ where samples and data are of one law: where they are one, so is the loss."""
    made = world("twinflow", schedule="flow", equal_share=1.0, cond_dropout=0.0, weight_power=power, **PLAIN)
    made.nets.student.network = Still()
    batch = made.batch()
    made.method.one_step = lambda nets, other, told: Answer(batch.x0)
    times = made.method.times(made.nets, made.batch())
    made.method.times = lambda nets, other: times
    eps, batches = batch.randn(), [made.batch(), made.batch()]
    for each in batches:
        each.randn = lambda: eps
    flow_map, own = (
        loss(made.nets, each)["total"]
        for loss, each in zip((made.method.loss, made.method.own_loss), batches, strict=True)
    )
    torch.testing.assert_close(own, flow_map)


class Still(torch.nn.Module):
    """The same answer wherever a jump ends."""

    def forward(self, x_t, t, cond=None, end=None):
        return 0.3 * x_t + 0 * t[:, None].to(x_t)


Answer = namedtuple("Answer", "x0")


def test_the_twin_is_told_an_end_above_all_real_ones():
    made = world("twinflow", schedule="flow", first_rho=50.0, **PLAIN)
    ends, student = [], made.nets.student

    def spy(x_t, t, cond=None, **told):
        ends.append((t, told["end"]))
        return student(x_t, t, cond, **told)

    made.method.own_loss(Networks({"student": _Spied(student, spy)}, made.nets.schedule), made.batch())
    (_, to_data), (t, twin) = ends
    assert bool((to_data == 0).all() and (twin == 1).all() and (t < 1).all())


class _Spied(torch.nn.Module):
    def __init__(self, inner, spy):
        super().__init__()
        self.inner, self.spy = inner, spy

    def forward(self, *args, **kwargs):
        return self.spy(*args, **kwargs)

    @property
    def sigma_data(self):
        return self.inner.sigma_data
