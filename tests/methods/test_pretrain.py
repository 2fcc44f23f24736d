"""Pretraining: plain denoising, conditions left out for guidance."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import COUNT, world

from stepdistill import timesteps
from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.pretrain import Pretrain
from stepdistill.prediction import Prediction
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


def test_a_network_that_knows_the_truth_has_no_loss(monkeypatch):
    """The noise that is asked for is the noise that was added."""
    made = world("pretrain", cond_dropout=0.0)
    batch, _t = made.batch(), None
    schedule = made.nets.schedule

    class Truth(Denoiser):
        def forward(self, x_t, t, cond=None, **_):
            alpha, sigma = (expand(f(t), x_t) for f in (schedule.alpha, schedule.sigma))
            return Prediction((x_t - alpha * batch.x0) / sigma, "eps", x_t, t, schedule)

    student = made.nets.student
    made.nets.modules["student"] = Truth(student.network, "eps", schedule)
    loss = made.method.loss(made.nets, batch)["total"]
    assert float(loss.max()) < 1e-4


@pytest.mark.parametrize("name", ["pretrain", "tsm", "ect", "scm", "dmd2", "add", "ladd", "meanflow"])
def test_log_normal_levels_are_in_units_of_the_datas_deviation(name, monkeypatch):
    """Twice the deviation, twice the noise."""
    settings = {"pretrain": {"time_density": "lognormal"}, "tsm": {"time_density": "lognormal"}}.get(name, {})
    settings |= {"dmd2": {"time_density": "lognormal", "t_low": 0.0, "t_high": 1.0}}.get(name, {})
    settings |= {
        "add": {"eye": "fourier", "time_density": "lognormal"},
        "ladd": {"student_times": "density"},
    }.get(name, {})
    levels = {}
    for unit in (1.0, 2.0):
        made, seen = world(name, schedule="edm", **settings), []
        unwrap(made.nets.student).network.sigma_data = unit
        original = timesteps.lognormal

        def noted(schedule, noise, mean, std, unit=1.0, seen=seen, original=original):
            seen.append(schedule.rho(times := original(schedule, noise, mean, std, unit)))
            return times

        monkeypatch.setattr(timesteps, "lognormal", noted)
        phase = next(iter(made.method.phases(0)))
        for _, loss in phase.terms:
            loss(made.nets, made.batch(3))
        levels[unit] = seen
        monkeypatch.setattr(timesteps, "lognormal", original)
    assert len(levels[1.0]) == len(levels[2.0]) > 0
    for one, two in zip(levels[1.0], levels[2.0], strict=True):
        # Away from the schedule's ends.
        inside = (one > 0.01) & (one < 30)
        torch.testing.assert_close(two[inside], 2 * one[inside])
