"""The student's gradient of the methods without a closed form, put together again in float64 from their equations.

What a paper holds constant (teacher, target, the state a rollout ends in) is a constant here: a gradient that
leaks through one of them, or that is missing, is another one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from test_matched_noise import FOURIER, HERE, batch, prepared
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import SCHEDULES
from stepdistill.methods.base import Batch, Method, Networks
from stepdistill.schedule import expand
from stepdistill.timesteps import lognormal, times_like

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", [make() for make in SCHEDULES.values()], ids=SCHEDULES)


def features(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: None, names: list[str]) -> list[Tensor]:
    """The one block there is, without hooks and in float64."""
    net, schedule = denoiser.network.inner, denoiser.schedule
    rho = schedule.rho(t)
    places = ((rho / (1 + rho))[:, None],) * 2
    return [net.hidden(torch.cat((x_t / expand(schedule.alpha(t), x_t) / (1 + rho[:, None]), *places), 1))]


def at_first(nets: Networks, eps: Tensor, time: float) -> Tensor:
    return expand(nets.schedule.sigma(times_like(time, eps)), eps) * eps


def constant(function, *arguments) -> Tensor:
    with torch.no_grad():
        return function(*arguments)


def kd(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """|G(x_t, t) - x0|^2 at one of the trajectory's states."""
    times = method.sampled_as.times(nets.schedule)
    place = twin.generator.randint(0, len(times))
    states = torch.cat((at_first(nets, twin.pairs.z, times[0])[:, None], twin.pairs.states), 1)
    x_t, t = states[range(len(place)), place], torch.tensor(times, dtype=torch.float64)[place]
    return (nets.student(x_t, t).x0 - twin.pairs.x0).square().mean()


def reward(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """10 + |x0 - 2|^2 of one step, or of the second of two, the first of which has no gradient."""
    first, second = method.sampled_as.grid(nets.schedule, 2)
    two = twin.generator.shared_randint(0, 2) == 1  # of the places (1, 0) and (2, 1)
    x_t = at_first(nets, twin.randn(), first)
    t = times_like(first, x_t)
    if two:
        before = constant(nets.student, x_t, t).x0
        t = times_like(second, x_t)
        x_t = nets.schedule.add_noise(before, twin.randn(), t)
    x0 = nets.student(x_t, t).x0
    total = 10 + (x0 - 2).square().mean()
    if "start" in nets.modules:
        total = total + 0.5 * (x0 - constant(nets.start, x_t, t).x0).square().mean()
    return total


def add(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """softplus(-D(eye(x0))) + 2.5 c(t) |x0 - sg teacher(sg x0 renoised)|^2."""
    schedule = nets.schedule
    grid = torch.tensor(sorted({*method.grid(schedule, 1), *method.grid(schedule, 2)}), dtype=torch.float64)
    t, eps = grid[twin.generator.randint(0, len(grid))], twin.randn()
    start = (t == grid[-1])[:, None]
    x_t = torch.where(start, at_first(nets, eps, float(grid[-1])), schedule.add_noise(twin.x0, eps, t))
    x0 = nets.student(x_t, t).x0
    gan = nnf.softplus(-nets.discriminator(method.eye.features(x0))).mean()
    t = lognormal(schedule, twin.generator, 0.0, 0.7)
    said = constant(nets.teacher, schedule.add_noise(x0.detach(), twin.randn(), t), t).x0
    weight = (1 + schedule.rho(t) ** 2) ** -0.5  # alpha of the VP schedule at this noise
    return gan + 2.5 * (weight[:, None] * (x0 - said).square()).mean()


def ladd(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """-D of x0 noised to tau, through the frozen teacher's features."""
    schedule, noise = nets.schedule, twin.generator
    first = noise.rand() < 0.3
    t = torch.where(first, method.grid(schedule, 1)[0], lognormal(schedule, noise, 0.2, 0.7))
    eps = twin.randn()
    x_t = torch.where(
        first[:, None],
        at_first(nets, eps, method.grid(schedule, 1)[0]),
        schedule.add_noise(twin.x0, eps, t),
    )
    x0 = nets.student(x_t, t).x0
    tau = lognormal(schedule, noise, 1.0, 0.5)
    x_tau = schedule.add_noise(x0, twin.randn(), tau)
    return -nets.discriminator(features(nets.teacher, x_tau, tau, None, [])).mean()


def lightning(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """0.7 softplus(-D(x_s, x_t)) + 0.3 |x_s - sg the predecessor's|^2, s the end of one step of two."""
    schedule = nets.schedule
    finer = torch.tensor((*method.grid(schedule, 4), schedule.t_min), dtype=torch.float64)
    i = twin.generator.randint(0, 2)
    t, middle, s = (finer[2 * i + k] for k in range(3))
    last = (i == 1)[:, None]
    x_t = schedule.add_noise(twin.x0, twin.randn(), t)
    with torch.no_grad():
        half = nets.predecessor(x_t, t).at(middle)
        second = nets.predecessor(half, middle)
        real = torch.where(last, second.x0, second.at(s))
    said = nets.student(x_t, t)
    x_s = torch.where(last, said.x0, said.at(s))
    seen = [features(nets.encoder, x, time, None, [])[0] for x, time in ((x_s, s), (x_t, t))]
    gan = nnf.softplus(-nets.discriminator([torch.cat(seen, 1)])).mean()
    return 0.7 * gan + 0.3 * (x_s - real).square().mean()


def both(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """The parts' losses by their weights, drawn one after another from one batch."""
    (*_, first), (*_, second) = method.parts
    return 0.25 * kd(first, nets, twin) + reward(second, nets, twin)


LADD = {"student_times": "density", "first_weight": 0.3, "student_std": 0.7, "time_std": 0.5}
CASES = {
    "kd": (kd, {}),
    "reward": (reward, HERE | {"anchor_weight": 0.5}),
    "add": (add, FOURIER | {"gan": "non_saturating"}),
    "ladd": (ladd, LADD),
    "lightning": (lightning, {"gan_weight": 0.7, "mse_weight": 0.3}),
    "compose": (both, {"parts": [{"name": "kd", "weight": 0.25}, {"name": "reward", **HERE}]}),
}


@EVERY_SCHEDULE
@pytest.mark.parametrize("name", CASES)
def test_the_students_gradient_is_that_of_its_equation(name, schedule, monkeypatch):
    expected, settings = CASES[name]
    for method in ("ladd", "lightning"):
        monkeypatch.setattr(f"stepdistill.methods.{method}.block_features", features)
    method, nets = prepared(name, settings, schedule, monkeypatch)
    if "discriminator" in nets.modules:
        nets.discriminator.double()
    terms = next(phase.terms for phase in method.phases(600) if phase.name == "student")
    drawn, twin = batch(method, schedule), batch(method, schedule)
    ours = sum(weight * loss(nets, drawn)["total"].mean() for weight, loss in terms)
    slopes = [
        torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(nets.student.parameters()))])
        for loss in (ours, expected(method, nets, twin))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-11)
    assert float(slopes[1].abs().max()) > 1e-3
