"""Output distillation: the teacher's prediction beside the data's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import method, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.schedule import expand


class Says(nn.Module):
    """The same of every place, so that its gradient can be read off."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = nn.Parameter(value)
        self.told: list = []

    def forward(self, x_t, t, cond=None):
        self.told.append((x_t, t, cond))
        return 1.0 * self.value


def test_a_student_that_is_its_teacher_has_the_datas_loss_alone():
    made = world("output_kd")
    made.nets.modules["student"] = made.nets.teacher
    losses = made.method.loss(made.nets, made.batch())
    assert float(losses["output"].max()) == 0
    assert torch.equal(losses["total"], losses["task"]) and float(losses["task"].min()) > 0


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_the_gradient_pulls_to_the_teacher_and_to_the_data(kind):
    """d total / d raw = 2 (w_out (raw - teacher) + w_task (raw - target)) / elements, whatever kind is predicted."""
    made = world(
        "output_kd", task_weight=0.25, output_weight=3.0, schedule="flow" if kind == "flow" else "vp"
    )
    schedule, batch = made.nets.schedule, made.batch(count=8)
    student, teacher = (Says(torch.randn(batch.x0.shape)) for _ in range(2))
    made.nets.modules |= {
        "student": Denoiser(student, kind, schedule),
        "teacher": Denoiser(teacher, kind, schedule),
    }
    losses = made.method.loss(made.nets, batch)
    losses["total"].sum().backward()
    ((x_t, t, cond),), ((same_x_t, same_t, same_cond),) = student.told, teacher.told
    assert torch.equal(x_t, same_x_t) and torch.equal(t, same_t) and torch.equal(cond, same_cond)
    alpha, sigma = (expand(f(t), x_t) for f in (schedule.alpha, schedule.sigma))
    eps = (x_t - alpha * batch.x0) / sigma
    target = {"eps": eps, "v": alpha * eps - sigma * batch.x0, "flow": eps - batch.x0, "x0": batch.x0}[kind]
    weight = (schedule.rho(t) ** -2 + made.nets.sigma_data**-2) if kind == "x0" else torch.ones(len(t))
    pull = 3.0 * (student.value - teacher.value) + 0.25 * (student.value - target)
    expected = 2 * expand(weight, x_t) * pull.detach() / x_t[0].numel()
    torch.testing.assert_close(student.value.grad, expected.float(), rtol=2e-3, atol=2e-3)
    assert teacher.value.grad is None


def test_weights_that_teach_nothing_are_refused():
    with pytest.raises(UserError, match="are both 0"):
        method("output_kd", task_weight=0.0, output_weight=0.0)
    with pytest.raises(UserError, match=r"method\.task_weight must be 0 or more, got -1"):
        method("output_kd", task_weight=-1.0)
