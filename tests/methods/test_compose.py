"""Compositions: the weighted sum of their parts, networks and states kept apart, one way of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, world

from stepdistill.errors import UserError
from stepdistill.methods import METHODS
from stepdistill.methods.base import Method, Phase
from stepdistill.rollout import simulate
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like


class Pull(Method):
    """The student's mean square towards `to`, with a network of its own and a counter to remember."""

    @dataclass
    class Config:
        to: float = 0.0

    needs_teacher = False

    def __init__(self, config: Any, steps=(1,)):
        super().__init__(config, steps)
        self.count = 0

    def networks(self, teacher, student):
        return {"scale": nn.Linear(1, 1, bias=False)}

    def phases(self, step):
        yield Phase("student", ("student",), ((1.0, self.loss),))
        yield Phase("scale", ("scale",), ((1.0, self.own),))

    def loss(self, nets, batch):
        x = batch.randn()
        x0 = nets.student(x, times_like(500.0, x), batch.cond).x0
        return {"total": (nets.scale.weight.detach() * (x0 - self.config.to)).square().mean(1)}

    def own(self, nets, batch):
        return {"total": (nets.scale.weight - self.config.to).square().expand(COUNT, 1).mean(1)}

    def after_step(self, nets, step, ran):
        self.count += ran.count("scale")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "pull", f"{__name__}:Pull")


def test_a_composition_is_the_weighted_sum_of_its_parts(registered):
    parts = [{"name": "pull", "to": 1.0}, {"name": "pull", "to": -2.0, "weight": 0.3}]
    made = world("compose", steps=(1,), parts=parts)
    assert set(made.nets.modules) == {"student", "pull/scale", "pull1/scale"}
    with torch.no_grad():
        made.nets.modules["pull/scale"].weight.fill_(1.5)
        made.nets.modules["pull1/scale"].weight.fill_(0.7)
    phases = list(made.method.phases(0))
    assert [phase.trains for phase in phases] == [("student",), ("pull/scale",), ("pull1/scale",)]
    assert [weight for weight, _ in phases[0].terms] == [1.0, 0.3]
    made.backward(phases[0])
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    batch, total = made.batch(), 0.0
    # One batch, drawn from in the parts' order.
    for to, scale, weight in ((1.0, 1.5, 1.0), (-2.0, 0.7, 0.3)):
        x = batch.randn()
        x0 = made.nets.student(x, times_like(500.0, x), batch.cond).x0
        total = total + weight * (scale * (x0 - to)).square().mean()
    expected = torch.autograd.grad(total, list(made.nets.student.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    made.backward(phases[2])
    assert float(made.nets.modules["pull1/scale"].weight.grad) == pytest.approx(
        0.3 * 2 * (0.7 + 2.0), rel=1e-5
    )


def test_a_composition_of_dmd2_with_itself_is_the_sum_of_its_parts():
    """The parts' losses, each with its own fake score, drawn one after another from one batch."""
    whole = world(
        "compose", steps=(1,), parts=[{"name": "dmd2", "weight": 0.5}, {"name": "dmd2", "weight": 0.5}]
    )
    whole.backward(next(iter(whole.method.phases(0))))
    ours = [p.grad.clone() for p in whole.nets.student.parameters()]
    alone = [worlds.method("dmd2", steps=(1,)) for _ in range(2)]
    batch = whole.batch()
    for number, method in enumerate(alone):
        scope = whole.nets.scoped(("dmd2", "dmd21")[number])
        loss = method.student_loss(scope, batch)["total"].mean()
        parts = torch.autograd.grad(loss, list(whole.nets.student.parameters()))
        ours = [a - 0.5 * b for a, b in zip(ours, parts, strict=True)]
    assert max(float(a.abs().max()) for a in ours) < 1e-6


def test_parts_keep_their_networks_and_states_apart(registered, own_code):
    method = worlds.method(
        "compose",
        steps=(1,),
        parts=[{"name": "pull"}, {"name": f"{__name__}:Pull"}, {"name": f"{__name__}:Pull"}],
    )
    scopes = [scope for scope, *_ in method.parts]
    assert len(set(scopes)) == 3 and scopes[:2] == ["pull", "Pull"]
    assert set(world(method).nets.modules) == {"student"} | {f"{scope}/scale" for scope in scopes}
    made = world(method)
    method.after_step(made.nets, 0, ("student", f"{scopes[1]}/scale"))
    method.after_step(made.nets, 1, tuple(phase.name for phase in method.phases(1)))
    state = method.state_dict()
    other = worlds.method(
        "compose",
        steps=(1,),
        parts=[{"name": "pull"}, {"name": f"{__name__}:Pull"}, {"name": f"{__name__}:Pull"}],
    )
    other.load_state_dict(state)
    assert set(state) == {f"{scope}/count" for scope in scopes}
    assert other.state_dict() == state and state[f"{scopes[1]}/count"] == 2


def test_in_a_composition_the_student_comes_before_every_critic():
    parts = [{"name": "dmd2", "student_every": 2}, {"name": "vsd", "student_every": 1}]
    method = worlds.method("compose", parts=parts)
    for step in range(2):
        names = [phase.name for phase in method.phases(step)]
        assert names == ["student", "dmd2/critic", "vsd/critic"]


def test_a_composition_carries_what_its_parts_carry():
    parts = [{"name": "dmd2", "carry_fake_score": True}, {"name": "dmd2"}]
    made = world("compose", parts=parts)
    assert made.method.carried == ("dmd2/fake_score",) and set(made.method.carried) < set(made.nets.modules)


def test_what_does_not_fit_together_is_refused(registered):
    for parts, says in (
        ([{"name": "pull"}], "at least two"),
        # The students take different inputs.
        ([{"name": "dmd2"}, {"name": "lcm"}], "cannot be composed"),
        # Different sampling rules.
        ([{"name": "dmd2"}, {"name": "pretrain"}], "cannot be composed"),
        # Different sampling times.
        ([{"name": "sim"}, {"name": "diff_instruct"}], "cannot be composed"),
        ([{"name": "dmd2"}, {"name": "dmd3"}], "unknown method 'dmd3'"),
        ([{"name": "dmd2"}, {"name": "dmd2", "gan": 1}], r"method\.parts\.1"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("compose", steps=(1,), parts=parts)


def test_parts_that_train_more_than_the_student_still_make_one_step():
    """SANA-Sprint: sCM trains a weighting along, LADD does not; one student step on the weighted sum."""
    parts = [{"name": "scm", "warmup": 1}, {"name": "ladd", "weight": 0.5, "warmup": 0}]
    made = world("compose", steps=(1, 2), schedule="trig", first_rho=0.0, parts=parts)
    phases = list(made.method.phases(0))
    assert [phase.trains for phase in phases] == [("student", "scm/weighting"), ("ladd/discriminator",)]
    # The term that reaches all comes last.
    assert [weight for weight, _ in phases[0].terms] == [0.5, 1.0]
    made.backward(phases[0])
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    batch = made.batch()
    ladd_, scm = made.method.parts[1].method, made.method.parts[0].method
    total = 0.5 * ladd_.student_loss(made.nets.scoped("ladd"), batch)["total"].mean()
    total = total + scm.loss(made.nets.scoped("scm"), batch, 1.0)["total"].mean()
    expected = torch.autograd.grad(total, list(made.nets.student.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_first_part_may_say_how_the_student_is_sampled():
    """Hyper-SD: DMD2 beside TSCD rolls the student out by TCD's rule, at TCD's times."""
    parts = [{"name": "tscd", "segments": 2}, {"name": "dmd2"}]
    with pytest.raises(UserError, match=r"method\.sampling=first"):
        worlds.method("compose", parts=parts)
    method = worlds.method("compose", steps=(4,), parts=parts, sampling="first", eta=0.5)
    assert method.sampling.rule == "tcd" and method.sampling.eta == 0.5
    made = world(method)
    dmd2 = method.parts[1].method
    for step in range(12):
        batch, twin = made.batch(step), made.batch(step)
        x_t, _, time = simulate(dmd2.sampling, made.nets, batch)
        twin.generator.shared_randint(0, 4)
        if time != 499:
            continue
        x = twin.randn()
        with torch.no_grad():
            rolled = Sampling(rule="tcd", eta=0.5).walk(
                made.nets.student,
                x,
                (999.0, 749.0, 499.0),
                lambda _, twin=twin: twin.randn(),
                twin.cond,
            )
        torch.testing.assert_close(x_t, rolled)
        break
    else:
        raise AssertionError("the position was never drawn")


def test_each_parts_own_target_follows_the_student():
    made = world("compose", parts=[{"name": "cd", "target_ema": 0.5}, {"name": "ect"}], sampling="first")
    before = [p.clone() for p in made.nets.modules["cd/target"].parameters()]
    made.method.after_step(made.nets, 0, ("student",))
    for now, old, student in zip(
        made.nets.modules["cd/target"].parameters(), before, made.nets.student.parameters(), strict=True
    ):
        torch.testing.assert_close(now, (old + student) / 2)
