"""The gradients of the methods without a closed form, put together again in float64 from their equations.

What a paper holds constant (teacher, target, the state a rollout ends in) is a constant here: a gradient that
leaks through one of them, or that is missing, is another one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from levels import FOURIER, HERE, batch, prepared
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import SCHEDULES
from stepdistill.methods.base import Batch, Method, Networks
from stepdistill.schedule import expand, times_like
from stepdistill.timesteps import lognormal

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
    times = method.times(nets.schedule)
    place = twin.generator.randint(0, len(times))
    states = torch.cat((at_first(nets, twin.pairs.z, times[0])[:, None], twin.pairs.states), 1)
    x_t, t = states[range(len(place)), place], torch.tensor(times, dtype=torch.float64)[place]
    return (nets.student(x_t, t).x0 - twin.pairs.x0).square().mean()


def reward(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """10 + |x0 - 2|^2 of one step, or of the second of two, the first of which has no gradient."""
    first, second = method.sampling.grid(nets.schedule, 2)
    # Of the places (1, 0) and (2, 1).
    two = twin.generator.shared_randint(0, 2) == 1
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


def add_x0(method: Method, nets: Networks, twin: Batch) -> Tensor:
    schedule = nets.schedule
    grid = torch.tensor(
        sorted({*method.sampling.grid(schedule, 1), *method.sampling.grid(schedule, 2)}), dtype=torch.float64
    )
    t, eps = grid[twin.generator.randint(0, len(grid))], twin.randn()
    start = (t == grid[-1])[:, None]
    x_t = torch.where(start, at_first(nets, eps, float(grid[-1])), schedule.add_noise(twin.x0, eps, t))
    return nets.student(x_t, t).x0


def add(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """softplus(-D(eye(x0))) + 2.5 c(t) |x0 - sg teacher(sg x0 renoised)|^2."""
    schedule, x0 = nets.schedule, add_x0(method, nets, twin)
    gan = sum(nnf.softplus(-each).mean() for each in nets.discriminator(method.eye.features(x0)))
    t = lognormal(schedule, twin.generator, 0.0, 0.7)
    said = constant(nets.teacher, schedule.add_noise(x0.detach(), twin.randn(), t), t).x0
    # alpha of the VP schedule at this noise.
    weight = (1 + schedule.rho(t) ** 2) ** -0.5
    return gan + 2.5 * (weight[:, None] * (x0 - said).square()).mean()


def add_critic(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """softplus(-D(real)) + softplus(D(sg x0)) + 0.3 |dD/d features of real|^2."""
    x0 = add_x0(method, nets, twin).detach()
    real = [feature.requires_grad_() for feature in method.eye.features(twin.x0)]
    logits = nets.discriminator(real)
    slopes = torch.autograd.grad(sum(each.mean(1).sum() for each in logits), real, create_graph=True)
    penalty = sum(slope.square().flatten(1).sum(1) for slope in slopes)
    pairs = zip(logits, nets.discriminator(method.eye.features(x0)), strict=True)
    games = sum((nnf.softplus(-each) + nnf.softplus(fake)).mean() for each, fake in pairs)
    return games + 0.3 * penalty.mean()


def ladd_x0(method: Method, nets: Networks, twin: Batch) -> Tensor:
    schedule, noise = nets.schedule, twin.generator
    first, time = noise.rand() < 0.3, method.sampling.grid(schedule, 1)[0]
    t = torch.where(first, time, lognormal(schedule, noise, 0.2, 0.7))
    eps = twin.randn()
    x_t = torch.where(first[:, None], at_first(nets, eps, time), schedule.add_noise(twin.x0, eps, t))
    return nets.student(x_t, t).x0


def ladd_logits(nets: Networks, twin: Batch, x0: Tensor) -> Tensor:
    tau = lognormal(nets.schedule, twin.generator, 1.0, 0.5)
    x_tau = nets.schedule.add_noise(x0, twin.randn(), tau)
    (logits,) = nets.discriminator(features(nets.teacher, x_tau, tau, None, []))
    return logits


def ladd(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """-D of x0 noised to tau, through the frozen teacher's features."""
    return -ladd_logits(nets, twin, ladd_x0(method, nets, twin)).mean()


def ladd_critic(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """relu(1 - D(real)) + relu(1 + D(sg x0)), each at a level of its own."""
    x0 = ladd_x0(method, nets, twin).detach()
    real, fake = (ladd_logits(nets, twin, each) for each in (twin.x0, x0))
    return ((1 - real).relu() + (1 + fake).relu()).mean()


def lightning_ends(
    method: Method, nets: Networks, twin: Batch
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """D(x_s, x_t) as a function of x_s, the student's x_s and the predecessor's; s the end of one step of two."""
    schedule = nets.schedule
    finer = torch.tensor((*method.sampling.grid(schedule, 4), schedule.t_min), dtype=torch.float64)
    i = twin.generator.randint(0, 2)
    t, middle, s = (finer[2 * i + k] for k in range(3))
    last = (i == 1)[:, None]
    x_t = schedule.add_noise(twin.x0, twin.randn(), t)
    with torch.no_grad():
        half = nets.predecessor(x_t, t).at(middle)
        second = nets.predecessor(half, middle)
        real = torch.where(last, second.x0, second.at(s))
    said = nets.student(x_t, t)

    def logits(x_s: Tensor) -> Tensor:
        seen = [features(nets.encoder, x, time, None, [])[0] for x, time in ((x_s, s), (x_t, t))]
        (logits,) = nets.discriminator([torch.cat(seen, 1)])
        return logits

    return logits, torch.where(last, said.x0, said.at(s)), real


def lightning(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """0.7 softplus(-D(x_s, x_t)) + 0.3 |x_s - sg the predecessor's|^2."""
    logits, fake, real = lightning_ends(method, nets, twin)
    return 0.7 * nnf.softplus(-logits(fake)).mean() + 0.3 * (fake - real).square().mean()


def lightning_critic(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """softplus(-D(predecessor's x_s)) + softplus(D(sg x_s)), into the encoder as well."""
    logits, fake, real = lightning_ends(method, nets, twin)
    return (nnf.softplus(-logits(real)) + nnf.softplus(logits(fake.detach()))).mean()


def both(method: Method, nets: Networks, twin: Batch) -> Tensor:
    """The parts' losses by their weights, drawn one after another from one batch."""
    (*_, first), (*_, second) = method.parts
    return 0.25 * kd(first, nets, twin) + reward(second, nets, twin)


LADD = {
    "student_times": "density",
    "first_weight": 0.3,
    "student_mean": 0.2,
    "student_std": 0.7,
    "time_std": 0.5,
}
CASES = {
    "kd": (kd, {}),
    "reward": (reward, HERE | {"anchor_weight": 0.5}),
    "add": (add, FOURIER | {"gan": "non_saturating", "r1_weight": 0.3}),
    "ladd": (ladd, LADD),
    "lightning": (lightning, {"gan_weight": 0.7, "mse_weight": 0.3}),
    "compose": (both, {"parts": [{"name": "kd", "weight": 0.25}, {"name": "reward", **HERE}]}),
}


CRITICS = {"add": add_critic, "ladd": ladd_critic, "lightning": lightning_critic}


def assert_same_gradient(phase: str, expected, name, schedule, monkeypatch) -> None:
    monkeypatch.setattr("stepdistill.methods.ladd.block_features", features)
    method, nets = prepared(name, CASES[name][1], schedule, monkeypatch)
    if "encoder" in nets.modules:
        monkeypatch.setattr(nets.encoder, "forward", lambda *at: features(nets.encoder, *at, [])[0])
    if "discriminator" in nets.modules:
        nets.discriminator.double()
    (turn,) = (each for each in method.phases(600) if each.name == phase)
    drawn, twin = batch(method, schedule), batch(method, schedule)
    ours = sum(weight * loss(nets, drawn)["total"].mean() for weight, loss in turn.terms)
    parameters = [p for key in turn.trains for p in nets.modules[key].parameters()]
    slopes = [
        torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)])
        for loss in (ours, expected(method, nets, twin))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-11)
    assert float(slopes[1].abs().max()) > 1e-3


@EVERY_SCHEDULE
@pytest.mark.parametrize("name", CASES)
def test_the_students_gradient_is_that_of_its_equation(name, schedule, monkeypatch):
    assert_same_gradient("student", CASES[name][0], name, schedule, monkeypatch)


@EVERY_SCHEDULE
@pytest.mark.parametrize("name", CRITICS)
def test_the_discriminators_gradient_is_that_of_its_equation(name, schedule, monkeypatch):
    assert_same_gradient("discriminator", CRITICS[name], name, schedule, monkeypatch)
