"""TSM: a student on the teacher's own terms, in its own kind, of any size."""

from __future__ import annotations

import pytest
import torch
import worlds
from gaussians import batch_of, exact
from torch import nn
from worlds import COUNT, world

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import SCHEDULES
from stepdistill.methods.base import Networks
from stepdistill.schedule import Flow
from stepdistill.timesteps import EDM_MEAN


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(schedule):
    """Loss 0 for the teacher itself, positive for anyone else."""
    made = world("tsm", schedule=schedule, cond_dropout=0.0)
    assert float(made.method.loss(made.nets, made.batch())["total"].min().detach()) > 0
    made.nets.modules["student"] = made.nets.teacher
    assert float(made.method.loss(made.nets, made.batch())["total"].max()) == 0


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_tsm_measures_the_error_in_the_students_own_kind(kind):
    """Off by d in its own kind: |d|^2, whatever the noise level (x0: times EDM's weight)."""
    schedule, off = Flow(), 0.3
    method, teacher = worlds.method("tsm", cond_dropout=0.0, time_density="lognormal"), exact(Flow())

    class Off(nn.Module):
        def forward(self, x_t, t, cond=None):
            return getattr(teacher(x_t, t), kind) + off

    nets = Networks({"student": Denoiser(Off(), kind, schedule), "teacher": teacher}, schedule)
    losses = method.loss(nets, batch_of())
    # In units of the data's deviation, which is 1 here.
    rho = (EDM_MEAN + 1.2 * batch_of().generator.randn(dtype=torch.float64)).exp()
    weight = rho**-2 + 1 if kind == "x0" else torch.ones_like(rho)
    torch.testing.assert_close(losses["total"], weight * off**2, rtol=1e-5, atol=1e-8)


def test_the_teacher_of_tsm_is_told_what_its_student_is_told():
    """Half of the conditions are dropped, for both alike."""
    made, heard = world("tsm", cond_dropout=0.5), []

    class Ear(nn.Module):
        sigma_data = 1.0

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x_t, t, cond=None):
            heard.append(cond)
            return self.inner(x_t, t, cond)

    for name in ("teacher", "student"):
        made.nets.modules[name] = Ear(made.nets.modules[name])
    made.method.loss(made.nets, made.batch())
    told, none = heard[0], made.family.config.classes
    assert torch.equal(told, heard[1]) and 0 < int((told == none).sum()) < COUNT
    assert torch.equal(told[told != none], made.batch().cond[told != none])


def test_a_smaller_student_starts_from_random_weights_and_follows_the_teacher():
    from stepdistill.families.toy import Toy

    family = Toy(Toy.Config(modes=4, classes=2, schedule="flow", fit_steps=0, student_width=24))
    student = family.student("random", ())
    assert student.network.width == 24
    made = world("tsm", schedule="flow", time_density="lognormal", time_mean=0.0)
    made.nets.modules["student"] = student
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for step in range(150):
        (phase,) = made.method.phases(step)
        losses.append(float(made.method.loss(made.nets, made.batch(step))["total"].median().detach()))
        made.backward(phase, step)
        optimizer.step()
    assert sum(losses[-30:]) < 0.6 * sum(losses[:30]), (sum(losses[-30:]), sum(losses[:30]))
