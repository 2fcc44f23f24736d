"""LADD (arXiv 2403.12015): two steps through the frozen teacher's features, times, misaligned pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import worlds
from worlds import world

from stepdistill.errors import UserError
from stepdistill.features import block_features
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction


def ladd(steps=(1, 2, 4), classes: int = 2, schedule: str = "vp", **settings):
    return world("ladd", steps=steps, classes=classes, schedule=schedule, **settings)


def test_the_students_gradient_comes_through_the_frozen_teachers_input():
    """Put together again from the phase's draws; with the taps cut off the input, nothing is left."""
    made = ladd()
    phase = next(iter(made.method.phases(600)))
    made.backward(phase, 600)
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    backbone = made.nets.teacher.backbone()
    assert all(p.grad is None for p in backbone.parameters())
    batch = made.batch(600, "student")
    method, schedule = made.method, made.nets.schedule
    t = method.times(made.nets, batch)
    eps = batch.randn()
    x_t = torch.where((t == 999)[:, None], eps, schedule.add_noise(batch.x0, eps, t))
    x0 = made.nets.student(x_t, t, batch.cond).x0
    tau = schedule.t_of_rho((1 + batch.generator.randn(dtype=torch.float64)).exp())
    x_tau = schedule.add_noise(x0, batch.randn(), tau)
    features = block_features(backbone, x_tau, tau, batch.cond, list(backbone.blocks))
    expected = torch.autograd.grad(
        -sum(each.mean() for each in made.nets.discriminator(features)),
        list(made.nets.student.parameters()),
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert sum(float(a.abs().sum()) for a in ours) > 1e-6


def test_student_times_are_the_grids_with_the_asked_shares():
    method = worlds.method("ladd", steps=(1, 2, 4), first_weight=0.7)
    made = world(method)
    grid = sorted({t for n in (1, 2, 4) for t in made.nets.schedule.few_step_grid(n, 4)}, reverse=True)

    def shares(warm: bool) -> list[float]:
        drawn = method.times(made.nets, made.batch(count=3200), warm)
        assert set(drawn.tolist()) <= set(grid)
        return [float((drawn == t).double().mean()) for t in grid]

    spread = 5 * (0.25 / 3200) ** 0.5
    for got, expected in zip(shares(False), (0.7, 0.1, 0.1, 0.1), strict=True):
        assert abs(got - expected) < spread
    for got, expected in zip(shares(True), (0, 0, 0.5, 0.5), strict=True):
        assert abs(got - expected) < spread
    alone = worlds.method("ladd", steps=(1,))
    assert set(alone.times(made.nets, made.batch(), True).tolist()) == {999.0}
    warm = [next(iter(method.phases(step))).terms[0][1].keywords["warm"] for step in (0, 499, 500)]
    assert warm == [True, True, False]


def test_max_time_weighting_puts_its_atom_on_pure_noise():
    """SANA-Sprint: half of the student's times are t_max, the rest lognormal in rho."""
    settings = {"student_times": "density", "first_weight": 0.5, "student_mean": 0.2, "student_std": 1.6}
    made = ladd(schedule="trig", **settings)
    t = made.method.times(made.nets, made.batch(count=6400))
    first = t == math.pi / 2
    assert abs(float(first.double().mean()) - 0.5) < 5 * (0.25 / len(t)) ** 0.5
    log_rho = made.nets.schedule.rho(t[~first]).log()
    assert abs(float(log_rho.mean()) - 0.2) < 5 * 1.6 / len(log_rho) ** 0.5
    assert abs(float(log_rho.std()) - 1.6) < 5 * 1.6 / (2 * len(log_rho)) ** 0.5


def test_the_student_starts_from_what_it_is_sampled_from():
    """At t_max pure noise, not alpha_999 x0 + sigma_999 eps; elsewhere noised data."""
    made, heard = ladd(first_weight=0.5), []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    )
    batch, twin = made.batch(600), made.batch(600)
    made.method.generate(made.nets, batch, False)
    ((x_t, t),) = heard
    assert torch.equal(made.method.times(made.nets, twin), t)
    eps, first = twin.randn(), t == 999
    assert bool(first.any()) and not bool(first.all())
    assert torch.equal(x_t[first], eps[first])
    torch.testing.assert_close(
        x_t[~first], made.nets.schedule.add_noise(twin.x0, eps, t)[~first], rtol=1e-6, atol=1e-6
    )


def test_the_relativistic_student_is_set_beside_real_data():
    made = ladd(gan="relativistic")
    loss = made.method.student_loss(made.nets, made.batch(600))["total"]
    batch = made.batch(600)
    x0, judged = made.method.generate(made.nets, batch, False), []
    for each in (x0, batch.x0):
        critic, x_tau = made.method.seen(made.nets, batch, each, batch.cond)
        judged.append(critic(x_tau))
    pairs = zip(*judged, strict=True)
    expected = sum(torch.nn.functional.softplus(real - fake).mean(1) for fake, real in pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_what_is_judged_is_the_same_under_every_schedule(schedule):
    """One level rho, whatever the schedule: the heads' inputs at equal noise are equal."""
    made = ladd(schedule=schedule, classes=1)
    batch = made.batch()
    _, x_tau = made.method.seen(made.nets, batch, batch.x0, None)
    again = made.batch()
    rho = (1 + again.generator.randn(dtype=torch.float64)).exp()
    at_unit_alpha = again.x0 + rho[:, None].float() * again.randn()
    alpha = made.nets.schedule.alpha(made.nets.schedule.t_of_rho(rho))[:, None].float()
    inside = rho < made.nets.schedule.rho(torch.tensor([made.nets.schedule.t_max], dtype=torch.float64))
    torch.testing.assert_close((x_tau / alpha)[inside], at_unit_alpha[inside], rtol=1e-4, atol=1e-4)


def test_ladds_discriminator_tells_real_from_generated_and_not_the_reverse():
    made = ladd()
    gan = made.method.discriminator_loss(made.nets, made.batch())["gan"]
    batch = made.batch()
    x0, judged = made.method.generate(made.nets, batch, False).detach(), []
    for each in (batch.x0, x0):
        critic, x_tau = made.method.seen(made.nets, batch, each, batch.cond)
        judged.append(critic(x_tau))
    pairs = zip(*judged, strict=True)
    expected = sum((1 - real).relu().mean(1) + (1 + fake).relu().mean(1) for real, fake in pairs)
    torch.testing.assert_close(gan, expected)


def test_misaligned_pairs_are_real_data_under_anothers_condition():
    made = ladd(misaligned=True)
    heard = []
    seen = made.method.seen
    made.method.seen = lambda nets, batch, x0, cond: heard.append((x0, cond)) or seen(nets, batch, x0, cond)
    losses = made.method.discriminator_loss(made.nets, made.batch(phase="discriminator"))
    batch = made.batch()
    (x_real, c_real), (_, c_fake), (x_mis, c_mis) = heard
    assert torch.equal(x_real, x_mis) and torch.equal(x_real, batch.x0)
    assert torch.equal(c_real, batch.cond) and torch.equal(c_fake, batch.cond)
    assert torch.equal(c_mis, batch.cond.roll(1))
    torch.testing.assert_close(losses["total"], losses["gan"] + losses["misaligned"])


def test_the_discriminators_step_leaves_no_gradient_on_the_student():
    made = ladd()
    loss = made.method.discriminator_loss(made.nets, made.batch(phase="discriminator"))["total"].sum()
    student = list(made.nets.student.parameters())
    assert all(p.requires_grad for p in student)
    assert all(g is None for g in torch.autograd.grad(loss, student, allow_unused=True, retain_graph=True))
    assert not any(p.requires_grad for p in made.nets.teacher.backbone().parameters())


def test_conditions_of_others_need_others():
    made = world("ladd", misaligned=True, warmup=0)
    batch = made.batch(phase="discriminator")
    noise = SampleNoise([0], step=0, phase="discriminator")
    alone = replace(
        batch,
        cond=batch.cond[:1],
        uncond=batch.uncond[:1],
        x0=batch.x0[:1],
        index=noise.index,
        generator=noise,
    )
    with pytest.raises(UserError, match=r"method\.misaligned needs .* batches of 2 at least"):
        made.method.discriminator_loss(made.nets, alone)


@pytest.mark.parametrize(("step", "times"), [(0, {499.0, 249.0}), (3, {999.0, 749.0, 499.0, 249.0})])
@pytest.mark.parametrize("name", ["student", "discriminator"])
def test_both_phases_meet_the_student_at_the_times_of_its_warm_up(name, step, times):
    made, heard = ladd(warmup=3, first_weight=0.5), []
    made.nets.student.register_forward_pre_hook(lambda _, args: heard.append(args[1]))
    (phase,) = (each for each in made.method.phases(step) if each.name == name)
    ((_, loss),) = phase.terms
    for draw in range(6):
        loss(made.nets, made.batch(draw, name))
    assert set(torch.cat(heard).tolist()) == times
