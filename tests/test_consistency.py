"""Consistency methods against what is known: the exact consistency function, its derivative, closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES, Toy, gaussian, gaussian_flow_map
from stepdistill.methods.base import Batch, Method, Networks, consistency, track_average
from stepdistill.methods.cd import CD
from stepdistill.methods.ect import ECT
from stepdistill.methods.meanflow import MeanFlow
from stepdistill.methods.scm import SCM, NoiseWeight
from stepdistill.methods.tscd import TSCD
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow, as_edm
from stepdistill.solvers import SOLVERS
from stepdistill.timesteps import few_step_grid, times_like

MEAN, STD = 0.3, 0.4
MADE = {name: make() for name, make in SCHEDULES.items()}
EVERY = pytest.mark.parametrize("schedule", MADE.values(), ids=MADE)
COUNT = 32


class Oracle(nn.Module):
    """The exact flow map of N(MEAN, STD^2) as a network of kind "x0": the consistency function, and with `end`
    the x0 whose straight line from x_t passes through the trajectory's point at `end`.
    """

    extras = {"end": lambda: None}

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond=None, end: Tensor | None = None) -> Tensor:
        schedule = self.schedule
        # The data itself, where a table ends a little before it.
        alpha, sigma = (f(t)[:, None] for f in (schedule.alpha, schedule.sigma))
        z = (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        if end is None:
            return MEAN + STD * z
        alpha_s, sigma_s = (f(end)[:, None] for f in (schedule.alpha, schedule.sigma))
        x_s = alpha_s * MEAN + (alpha_s**2 * STD**2 + sigma_s**2).sqrt() * z
        # x_t = alpha x0 + sigma eps and x_s = alpha_s x0 + sigma_s eps.
        return (sigma * x_s - sigma_s * x_t) / (sigma * alpha_s - sigma_s * alpha)


class Affine(nn.Module):
    """The smallest student with a gradient: x0 = a x_t + b + c t, so that everything has a closed form."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond=None, end: Tensor | None = None) -> Tensor:
        a, b, c = self.weight
        extra = 0 if end is None else 0.05 * end[:, None]
        return a * x_t + b + c * t[:, None] + extra


def nets_of(schedule: Schedule, student: nn.Module | None = None, **more: nn.Module) -> Networks:
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    student = Denoiser(student or Oracle(schedule), "x0", schedule)
    modules = {"teacher": teacher, "student": student, "target": student, "weighting": NoiseWeight()}
    return Networks(modules | more, schedule)


def batch_of(count: int = COUNT, step: int = 0) -> Batch:
    noise = SampleNoise(range(count), step=step, phase="student")
    x0 = MEAN + STD * SampleNoise(range(count), phase="data").randn(1, dtype=torch.float64)
    batch = Batch(None, None, (1,), noise.index, noise, x0)
    batch.randn = lambda: noise.randn(1, dtype=torch.float64)
    return batch


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


# ------------------------------------------------------------------------------------------ what all of them share


@EVERY
def test_boundary_a_clean_state_is_its_own_beginning(schedule):
    x = torch.randn(COUNT, 1, dtype=torch.float64)
    low, above = times_like(schedule.t_min, x), times_like(schedule.t_min + 1e-3 * schedule.t_max, x)
    wrong = Prediction(x + 5, "x0", x, low, schedule)
    assert torch.equal(consistency(wrong), x / schedule.alpha(low)[:, None])
    assert torch.equal(consistency(Prediction(x + 5, "x0", x, above, schedule)), x + 5)


@EVERY
def test_as_edm_keeps_the_range_of_noise(schedule):
    frame = as_edm(schedule)
    assert isinstance(frame, EDM)
    ends = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).clamp(0.002, 80)
    torch.testing.assert_close(torch.tensor([frame.t_min, frame.t_max]), ends.float())


def test_a_target_network_follows_slowly():
    student, target = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.detach().clone()
    track_average(target, student, 0.75)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * student.weight)
    track_average(target, student, 0.0)
    assert torch.equal(target.weight, student.weight)


# ----------------------------------------------------------------------------------------------------------------- CD


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_cds_loss_at_the_exact_consistency_function_is_the_solvers_local_error(solver, order):
    """Halving the step divides the endpoint error by 2^order: 4 for Euler, 8 for Heun."""
    schedule = EDM()
    nets = nets_of(schedule)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    t = times_like(0.8, x)

    def error(step: float) -> float:
        x_s = SOLVERS[solver](lambda x, s: nets.teacher(x, s), x, t, t - step)
        ahead, here = (consistency(nets.student(a, b)) for a, b in ((x_s, t - step), (x, t)))
        return float((ahead - here).abs().max())

    ratios = [error(h) / error(h / 2) for h in (0.05, 0.025)]
    assert all(abs(ratio - 2**order) < 0.15 * 2**order for ratio in ratios), ratios


@EVERY
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cd_is_small_at_the_oracle_and_falls_with_the_number_of_points(schedule, solver):
    def loss(points: int) -> float:
        method = CD(CD.Config(points=points, solver=solver))
        return float(method.loss(nets_of(schedule), batch_of(512))["total"].mean().sqrt())

    coarse, fine = loss(40), loss(160)
    assert fine < coarse / (3.0 if solver == "euler" else 6.0) and coarse < 0.1
    off = CD(CD.Config(points=40)).loss(nets_of(schedule, Affine()), batch_of(512))["total"].mean().sqrt()
    assert float(off) > 3 * coarse


@pytest.mark.parametrize("name", ["vp", "flow", "trig"])
def test_cd_and_ect_say_the_same_under_every_schedule_at_matched_noise(name):
    """One network, wrapped as if made for another schedule: the same loss, the same gradient."""

    class Matched(nn.Module):
        """An EDM network spoken to in another schedule's terms."""

        def __init__(self, inner, schedule):
            super().__init__()
            self.inner, self.schedule = inner, schedule

        def forward(self, x_t, t, cond=None):
            alpha = self.schedule.alpha(t)[:, None]
            return self.inner(x_t / alpha, self.schedule.rho(t))

    for method in (CD(CD.Config()), ECT(ECT.Config()), ECT(ECT.Config(teacher_step=True)), SCM(SCM.Config())):
        found = []
        for schedule in (EDM(0.0293, 14.6), MADE[name]):
            frame = as_edm(MADE[name])
            net = Affine()
            native = EDM(frame.t_min, frame.t_max) if isinstance(schedule, EDM) else schedule
            nets = nets_of(native, net if isinstance(schedule, EDM) else Matched(net, schedule))
            losses = method.loss(nets, batch_of(), **({"stage": 3} if isinstance(method, ECT) else {}))
            found.append((losses["total"], gradient(losses["total"].mean(), net)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=f"{type(method).__name__} {name}")


def test_cds_gradient_is_the_online_networks_alone():
    """2 (f(x_t) - f(x_s)) df(x_t)/dtheta, put together again: no gradient through target or teacher."""
    method, net = CD(CD.Config(points=18)), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    from stepdistill.timesteps import ode_grid

    grid = ode_grid(EDM(), 17, "karras")
    n = twin.generator.randint(0, 17)
    t, s = grid[n], grid[n + 1]
    x_t = twin.x0 + t[:, None] * twin.randn()
    d = (x_t - nets.teacher(x_t, t).x0) / t[:, None]
    x_s = x_t + d * (s - t)[:, None]
    d2 = (x_s - nets.teacher(x_s, s).x0) / s[:, None]
    x_s = x_t + (d + d2) / 2 * (s - t)[:, None]
    end = (s <= 0.002)[:, None]
    target = torch.where(end, x_s, nets.target(x_s, s).x0).detach()
    pull = 2 * (nets.student(x_t, t).x0 - target).detach() / COUNT
    expected = torch.stack([(pull * x_t).sum(), pull.sum(), (pull * t[:, None]).sum()])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- ECT


def test_ects_mapping_is_the_papers():
    method = ECT(ECT.Config())
    t = torch.tensor([0.5, 1.0, 3.0, 80.0], dtype=torch.float64)
    first, last = method.ratio(t, 0), method.ratio(t, 7)
    torch.testing.assert_close(first, torch.tensor([0.0, 0.0, 0.3103, 0.5]).double(), rtol=0, atol=1e-3)
    assert float(last.min()) > 0.98 and float(last[-1]) == pytest.approx(255 / 256)
    for stage in range(7):
        assert bool((method.ratio(t, stage) <= method.ratio(t, stage + 1)).all())


def test_ects_stage_follows_the_updates():
    method = ECT(ECT.Config(double_every=10, stages=3))
    found = [next(iter(method.phases(step))).terms[0][1].keywords["stage"] for step in (0, 9, 10, 29, 1000)]
    assert found == [0, 0, 1, 2, 2]


def test_ect_begins_as_denoising_towards_the_data():
    """Where r is 0 the target is x0 itself and the loss |f - x0| / t."""
    method, net = ECT(ECT.Config(time_mean=-3.0, time_std=0.5)), Affine()
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
    data = ECT(ECT.Config()).loss(nets, batch_of(2000), stage=7)["total"].mean()
    ode = ECT(ECT.Config(teacher_step=True)).loss(nets, batch_of(2000), stage=7)["total"].mean()
    assert float(ode) < 0.05 * float(data)


def test_ect_at_a_perfect_fit_has_a_zero_gradient_not_a_nan():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x_t, t, cond=None):
            return self.value.expand_as(x_t)

    net = Constant()
    loss = ECT(ECT.Config(time_mean=1.0, time_std=0.1)).loss(nets_of(EDM(), net), batch_of(), stage=7)["total"]
    assert gradient(loss.mean(), net).tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------------------- sCM


@EVERY
@pytest.mark.parametrize("how", ["forward", "difference"])
def test_the_tangent_of_the_exact_consistency_function_is_zero(schedule, how):
    method = SCM(SCM.Config(derivative=how, difference_step=1e-4, time_mean=-0.5, time_std=0.7))
    tolerance = 1e-10 if how == "forward" else 1e-5
    assert float(method.loss(nets_of(schedule), batch_of())["tangent"].max()) < tolerance
    assert float(method.loss(nets_of(schedule, Affine()), batch_of())["tangent"].min()) > 0.01 * tolerance


def test_a_denoiser_is_not_consistent():
    nets = nets_of(EDM())
    nets.modules["student"] = nets.teacher
    assert float(SCM(SCM.Config()).loss(nets, batch_of())["tangent"].mean()) > 0.02


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_scms_gradient_is_the_limit_of_discrete_consistency(sigma_data):
    """r = 1, no normalisation, u = 0: g = cos(t) df/dt and df = -s sin(t) dF, so the gradient is that of
    |f(x_t) - sg f(x_{t-h})|^2 / h over tan(t), times the prior weight 1 / (s tan t).
    """
    trig, net = TrigFlow(sigma_data), Affine()
    net.sigma_data = sigma_data
    method = SCM(SCM.Config(normalise=False, time_mean=-0.3, time_std=0.5))
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
