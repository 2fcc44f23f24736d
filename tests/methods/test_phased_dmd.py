"""Phased DMD (arXiv 2510.27684): what its fake scores learn, where phases end, who is matched where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import worlds
from worlds import stir, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES, Mixture
from stepdistill.losses import denoising
from stepdistill.noise import SampleNoise
from stepdistill.schedule import Flow, expand, times_like


def mixture(schedule) -> Mixture:
    return Mixture(schedule, torch.tensor([[-1.0], [0.8]]), 0.3, torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_the_fake_score_learns_the_exact_velocity_from_a_state_and_not_from_x0(name):
    """The mean of the pair, near a place of x_t, is the posterior mean of the law of x_t."""
    schedule = SCHEDULES[name]()
    law, method = mixture(schedule), worlds.method("phased_dmd")
    noise = SampleNoise(range(400_000), seed=1)
    x0 = law.draw(noise).double()
    s = schedule.t_of_rho(torch.full((len(x0),), 0.6)).double()
    s = s.round() if schedule.discrete else s
    x_s = schedule.add_noise(x0, noise.randn(1, dtype=torch.float64), s)
    added = schedule.t_of_rho(torch.full((len(x0),), 0.9))
    at = method.onward(schedule, x_s, noise.randn(1, dtype=torch.float64), s, added)
    # They are a pair of x_t, and between s and pure noise in flow's time.
    torch.testing.assert_close(schedule.add_noise(at.x0, at.eps, at.t), at.x_t, rtol=1e-6, atol=1e-6)
    low, share, found = (float(Flow().t_of_rho(schedule.rho(time))[0]) for time in (s, added, at.t))
    assert found == pytest.approx(low + (1 - low) * share, rel=1e-2)
    exact = Denoiser(law, "x0", schedule)(at.x_t, at.t).x0
    for place in (-0.5, 0.4):
        near = ((at.x_t / expand(schedule.alpha(at.t), at.x_t) - place).abs() < 0.05)[:, 0]
        error = (at.x0 - exact)[near, 0]
        assert abs(float(error.mean())) < 5 * float(error.std()) / int(near.sum()) ** 0.5 < 0.1


def test_without_noise_at_its_end_a_phase_is_plain_denoising():
    schedule = SCHEDULES["flow"]()
    x0, eps = torch.randn(2, 8, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    at = worlds.method("phased_dmd").onward(schedule, x0, eps, None, t)
    torch.testing.assert_close(at.x_t, schedule.add_noise(x0, eps, t))
    torch.testing.assert_close(at.x0, x0)
    torch.testing.assert_close(at.eps, eps)
    torch.testing.assert_close(at.weight, torch.ones_like(t))


def test_phases_take_turns_and_end_where_the_next_begins():
    made = world("phased_dmd", steps=(4,), schedule="flow", phases=2, student_every=2)
    trains = [[phase.trains[0] for phase in made.method.phases(step)] for step in range(4)]
    assert trains == [
        ["student", "fake_score"],
        ["fake_score"],
        ["student", "fake_score_1"],
        ["fake_score_1"],
    ]
    grid = made.method.sampling.grid(made.nets.schedule, 4)
    assert made.method.end(made.nets.schedule, 0) == grid[2]
    asked = {0: set(), 1: set()}
    for step in range(24):
        for phase, times in asked.items():
            said, x_s = made.method.answer(made.nets, made.batch(step), phase)
            times.add(float(said.t[0]))
            expected = said.at(times_like(grid[2], x_s)) if phase == 0 else said.x0
            torch.testing.assert_close(x_s, expected)
    assert asked == {0: set(grid[:2]), 1: set(grid[2:])}


@pytest.mark.parametrize("phase", [0, 1])
def test_the_students_gradient_is_fake_minus_real_at_the_phases_end(phase):
    """Of the phase's own fake score, through the last call alone, the scores' answers constants."""
    made = world("phased_dmd", steps=(4,), schedule="flow", normalise=False, guidance_scale=1.0)
    method, nets, schedule = made.method, made.nets, made.nets.schedule
    stir(nets.fake_score)
    parameters = list(nets.student.parameters())
    asked = []
    for network in (nets.teacher, nets.modules["fake_score"], nets.modules["fake_score_1"]):
        network.register_forward_pre_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    deep = 0
    for step in range(6):
        batch, twin = made.batch(step), made.batch(step)
        ours = torch.autograd.grad(method.student_loss(nets, batch, phase)["total"].sum(), parameters)
        said, x_s = method.answer(nets, twin, phase)
        deep += float(said.t[0]) not in (method.sampling.grid(schedule, 4)[0], method.end(schedule, 0))
        # From the state it was asked at, a constant.
        again = nets.student(said.x_t.detach(), said.t, twin.cond)
        again = again.x0 if phase else again.at(times_like(method.end(schedule, 0), x_s))
        t = method.times(nets, twin, method.config.t_low, method.config.t_high)
        eps, s = twin.randn(), None if phase else times_like(method.end(schedule, 0), x_s)
        with torch.no_grad():
            at = method.onward(schedule, again, eps, s, t)
            fake = nets.modules["fake_score_1" if phase else "fake_score"](at.x_t, at.t, twin.cond).x0
            pull = (fake - nets.teacher(at.x_t, at.t, twin.cond).x0).to(again) / again[0].numel()
        right = torch.autograd.grad(again, parameters, pull)
        for one, other in zip(ours, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert max(float(one.abs().max()) for one in ours) > 1e-5
    assert deep and not any(asked)


@pytest.mark.parametrize("schedule", ["vp", "flow", "edm"])
@pytest.mark.parametrize("phase", [0, 1])
def test_the_normaliser_is_of_the_students_answer_and_not_of_the_noised_state(phase, schedule):
    """x_s still has noise in it, whose size would say how far the student is from the teacher."""
    losses = []
    for normalise in (True, False):
        made = world("phased_dmd", steps=(4,), schedule=schedule, normalise=normalise)
        stir(made.nets.fake_score)
        losses.append(made.method.student_loss(made.nets, made.batch(), phase)["matching"])
    batch, method, nets = made.batch(), made.method, made.nets
    with torch.no_grad():
        said, x_s = method.answer(nets, batch, phase)
        t = method.times(nets, batch, method.config.t_low, method.config.t_high)
        at = method.onward(nets.schedule, x_s, batch.randn(), method.start(nets.schedule, phase, t), t)
        real = method.teacher_at(nets, batch, at.x_t, at.t).x0
    # The loss is half of a mean square, its direction over w.
    w = (said.x0 - real).abs().flatten(1).mean(1)
    torch.testing.assert_close(losses[0] * w**2, losses[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("phase", [0, 1])
def test_the_fake_score_learns_what_noise_was_added_and_nothing_reaches_the_student(phase):
    made = world("phased_dmd", steps=(4,), schedule="flow")
    method, nets, schedule = made.method, made.nets, made.nets.schedule
    for module in nets.modules.values():
        module.requires_grad_(True)
    fake = nets.modules["fake_score_1" if phase else "fake_score"]
    loss = method.critic_loss(nets, made.batch(3), phase)["total"]
    reached = torch.autograd.grad(
        loss.sum(), [*nets.student.parameters()], allow_unused=True, retain_graph=True
    )
    assert all(slope is None for slope in reached)
    twin = made.batch(3)
    _, x_s = method.answer(nets, twin, phase)
    t, eps = method.critic_times(nets, twin), twin.randn()
    s = None if phase else times_like(method.end(schedule, 0), x_s)
    at = method.onward(schedule, x_s.detach(), eps, s, t)
    # Weighed, an error of the pair's noise is one of the noise that was added.
    added = at.eps * expand(at.weight.sqrt(), at.eps)
    torch.testing.assert_close(added.float(), eps, rtol=1e-4, atol=1e-4)
    error = denoising(fake(at.x_t, at.t, twin.cond), at.x0, at.eps, fake.sigma_data)
    torch.testing.assert_close(loss, (at.weight * error).to(loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phase", [0, 1])
def test_the_fake_scores_guided_answer_is_what_must_denoise(phase):
    """Where it lost its condition that is the unconditional one, whatever the scale."""
    made = world("phased_dmd", steps=(4,), schedule="flow", critic_guidance_scale=3.0, critic_dropout=0.5)
    method, nets, schedule = made.method, made.nets, made.nets.schedule
    fake = nets.modules["fake_score_1" if phase else "fake_score"]
    loss, twin = method.critic_loss(nets, made.batch(3), phase)["total"], made.batch(3)
    _, x_s = method.answer(nets, twin, phase)
    t, eps = method.critic_times(nets, twin), twin.randn()
    s = None if phase else times_like(method.end(schedule, 0), x_s)
    at, (_, dropped) = method.onward(schedule, x_s, eps, s, t), twin.dropped(0.5)
    assert 0 < int(dropped.sum()) < len(dropped)
    told, untold = (fake(at.x_t, at.t, cond) for cond in (twin.cond, twin.uncond))
    share = torch.where(dropped, 0.0, 3.0)[:, None]
    said = replace(told, raw=untold.raw + share * (told.raw - untold.raw))
    error = denoising(said, at.x0, at.eps, fake.sigma_data)
    torch.testing.assert_close(loss, (at.weight * error).to(loss), rtol=1e-4, atol=1e-5)


def test_a_student_whose_law_the_fake_score_knows_as_the_teachers_is_left_alone():
    made = world("phased_dmd", schedule="flow", classes=1)
    made.nets.modules["fake_score"] = made.nets.modules["fake_score_1"] = made.nets.teacher
    made.method.config.guidance_scale = 1.0
    for phase in (0, 1):
        loss = made.method.student_loss(made.nets, made.batch(), phase)["total"].mean()
        slopes = torch.autograd.grad(loss, list(made.nets.student.parameters()))
        assert max(float(slope.abs().max()) for slope in slopes) < 1e-7


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": (1, 2)},
        {"steps": (2,), "phases": 3},
        {"shared_samples": True},
        {"steps": (4,), "simulated": "longest"},
    ],
)
def test_what_it_cannot_do_is_refused(wrong):
    with pytest.raises(UserError, match=r"method\.(phases|shared_samples|simulated=longest .* leave it out)"):
        worlds.method("phased_dmd", **wrong)
