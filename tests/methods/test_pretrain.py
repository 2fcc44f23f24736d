"""Pretraining: plain denoising, conditions left out for guidance."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import COUNT, world

from stepdistill.denoiser import Denoiser
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.pretrain import Pretrain
from stepdistill.schedule import expand


def test_pretrain_drops_the_asked_share_of_conditions():
    heard = []
    made = world("pretrain", cond_dropout=0.25)

    class Ear(Denoiser):
        def forward(self, x_t, t, cond=None):
            heard.append(cond)
            return super().forward(x_t, t, cond)

    student = made.nets.student
    made.nets.modules["student"] = Ear(student.network, student.kind, student.native)
    batch = made.batch(count=1600)
    made.method.loss(made.nets, batch)
    (told,), given = heard, batch.cond
    dropped = told == 2
    assert abs(float(dropped.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 1600) ** 0.5
    assert torch.equal(told[~dropped], given[~dropped])


@pytest.mark.parametrize("method", [Pretrain, DMD2])
def test_edms_weight_takes_the_networks_own_sigma_data(method):
    """The pixel family is preconditioned with 0.5: c_out-sized errors then weigh 1 at every noise level."""
    made = world({Pretrain: "pretrain", DMD2: "dmd2"}[method], steps=(1,), classes=1, schedule="edm")
    name = "student" if method is Pretrain else "fake_score"
    data = 0.5

    class Off(nn.Module):
        sigma_data = data

        def forward(self, x_t, t, cond=None):
            sigma = expand(t, x_t)
            return target + sigma * data / (sigma**2 + data**2).sqrt()

    target = torch.full((COUNT, 2), 0.3)
    made.nets.modules[name] = Denoiser(Off(), "x0", made.nets.schedule)
    batch = made.batch(images=True)
    batch.x0 = target
    if method is DMD2:
        made.nets.modules["student"] = Denoiser(Constant(target), "x0", made.nets.schedule)
        total = made.method.critic_loss(made.nets, batch)["total"]
    else:
        total = made.method.loss(made.nets, batch)["total"]
    torch.testing.assert_close(total, torch.ones(COUNT), rtol=1e-3, atol=1e-3)


class Constant(nn.Module):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x_t, t, cond=None):
        return self.value
