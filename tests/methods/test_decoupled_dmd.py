"""Decoupled DMD (arXiv 2511.22677) and CDM (arXiv 2605.06376): two directions, each with its own noise; any step count."""

from __future__ import annotations

import itertools

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import Mixture
from stepdistill.methods.decoupled_dmd import earlier
from stepdistill.schedule import EDM, VP, Flow, TrigFlow

BOTH = pytest.mark.parametrize("name", ["decoupled_dmd", "cdm"])


@BOTH
def test_the_students_gradient_is_of_both_directions_each_over_its_own_scale(name):
    """-(DM / n + CA / n') / elements, times dx0: put together again from the batch's draws."""
    made = world(name, augmentation=3.0, **({"between_weight": 0.0} if name == "cdm" else {}))
    nets, method = made.nets, made.method
    student = list(nets.student.parameters())
    ours = torch.autograd.grad(method.student_loss(nets, made.batch())["total"].mean(), student)
    batch = made.batch()
    x_t, t = method.anchor(nets, batch)
    x0 = nets.student(x_t, t, batch.cond).x0
    with torch.no_grad():
        x_tau, tau = method.diffuse(nets, batch, x0)
        told, fake = (net(x_tau, tau, batch.cond).x0 for net in (nets.teacher, nets.fake_score))
        scale = (x0 - told).abs().mean(1, keepdim=True).clamp(min=0.1)
        direction = (told - fake) / scale
        tau = earlier(nets.schedule, t, batch.generator.rand())
        x_tau = nets.schedule.add_noise(x0, batch.randn(), tau)
        told, untold = (nets.teacher(x_tau, tau, cond).x0 for cond in (batch.cond, batch.uncond))
        direction += 3.0 * (told - untold) / (x0 - told).abs().mean(1, keepdim=True).clamp(min=0.1)
    expected = torch.autograd.grad((-direction * x0).mean(), student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@BOTH
def test_where_the_fake_score_is_the_teacher_only_augmentation_is_left(name):
    made = world(name, augmentation=0.0)
    made.nets.modules["fake_score"] = made.nets.teacher
    losses = made.method.student_loss(made.nets, made.batch())
    assert float(losses["total"].detach().abs().max()) == 0
    made = world(name, augmentation=1.0)
    made.nets.modules["fake_score"] = made.nets.teacher
    losses = made.method.student_loss(made.nets, made.batch())
    assert float(losses["matching"].detach().abs().max()) == 0 < float(losses["augmentation"].detach().max())


def test_augmentation_has_no_fixed_point():
    """Two Gaussians of equal variance: told and untold answers differ by the same vector wherever the student is."""
    made = world("decoupled_dmd", augmentation=7.0)
    nets, batch = made.nets, made.batch()
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])

    class Two(nn.Module):
        def forward(self, x_t, t, cond=None):
            a, b = (Mixture(nets.schedule, mean[None], 0.4)(x_t, t) for mean in means)
            return torch.where((cond == 2)[:, None], b, a)

    nets.modules["teacher"] = Denoiser(Two(), "x0", nets.schedule)
    t = torch.full((COUNT,), 700.0, dtype=torch.float64)
    found = []
    for shift in (0.0, 5.0):
        twin = made.batch()
        found.append(
            made.method.augmentation(
                nets, twin, batch.x0 + shift if batch.x0 is not None else twin.randn() * 0 + shift, t
            )[0]
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert float(found[0].abs().min()) > 1e-3


@pytest.mark.parametrize(
    "schedule", [VP.from_betas(), EDM(), Flow(), TrigFlow()], ids=["vp", "edm", "flow", "trig"]
)
def test_augmentation_looks_at_less_noise_than_the_student_stands_in(schedule):
    t = torch.linspace(schedule.t_min, schedule.t_max, 9, dtype=torch.float64)[1:]
    for share in (0.0, 0.3, 1.0):
        tau = earlier(schedule, t, torch.full_like(t, share))
        assert bool((tau <= t + 1e-9).all()) and bool((tau >= schedule.t_min).all())
    halves = earlier(Flow(), torch.tensor([0.8, 0.4]).double(), torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(halves, torch.tensor([0.4, 0.2]).double())


def test_without_conditions_there_is_no_augmentation():
    made = world("decoupled_dmd", classes=1)
    assert "augmentation" not in made.method.student_loss(made.nets, made.batch())


@BOTH
def test_the_fake_score_is_drawn_to_the_student_when_that_has_moved(name):
    made = world(name, critic_pull=0.2)
    before = [p.detach().clone() for p in made.nets.fake_score.parameters()]
    made.method.after_step(made.nets, 0, ("critic",))
    assert all(torch.equal(p, q) for p, q in zip(before, made.nets.fake_score.parameters(), strict=True))
    made.method.after_step(made.nets, 0, ("student", "critic"))
    for old, new, followed in zip(
        before, made.nets.fake_score.parameters(), made.nets.student.parameters(), strict=True
    ):
        torch.testing.assert_close(new.detach(), 0.8 * old + 0.2 * followed.detach())


def test_a_fake_score_of_another_make_is_refused():
    with pytest.raises(
        UserError, match=r"method\.critic_pull=0.001: the fake score is of another make .* set .* to 0"
    ):
        world("decoupled_dmd", fake_score_lora={"rank": 2})
    for settings, says in (
        ({"floor": 0.0}, r"method\.floor"),
        ({"augmentation": -1.0}, r"method\.augmentation"),
        ({"critic_pull": 1.0}, r"method\.critic_pull"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("decoupled_dmd", **settings)


# ------------------------------------------------------------------------------------------------------- CDM


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_cdms_grids_are_random_and_in_flows_range(schedule):
    made = world("cdm", schedule=schedule, most_steps=5)
    at, counts, inner = made.nets.schedule, set(), []
    for step in range(40):
        times = made.method.grid(at, made.batch(step))
        assert times[0] == at.t_max and times == sorted(set(times), reverse=True)
        assert times == made.method.grid(at, made.batch(step))
        counts.add(len(times))
        inner += times[1:]
    shares = Flow().t_of_rho(at.rho(torch.tensor(inner, dtype=torch.float64)))
    assert counts == {1, 2, 3, 4, 5}
    # Whole times of a table lie a little beside.
    assert 0.24 < float(shares.min()) < 0.35 and 0.85 < float(shares.max()) < 0.96


def test_cdms_anchor_follows_the_students_own_ode():
    made = world("cdm", schedule="flow", most_steps=4)
    for step in range(8):
        batch = made.batch(step)
        times = made.method.grid(made.nets.schedule, batch)
        place = batch.generator.shared_randint(0, len(times))
        x = batch.randn()
        with torch.no_grad():
            for a, b in itertools.pairwise(times[: place + 1]):
                t = torch.full((COUNT,), a, dtype=torch.float64)
                x = x - (a - b) * made.nets.student(x, t, batch.cond).flow
        ours, t = made.method.anchor(made.nets, made.batch(step))
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)
        assert not ours.requires_grad and set(t.tolist()) == {times[place]}


def test_no_gradient_reaches_the_point_between():
    """The second answer alone is taught: the same as a second student's, asked at a constant x'."""
    made = world("cdm", schedule="flow", augmentation=0.0)
    nets, method = made.nets, made.method
    student = list(nets.student.parameters())
    ours = torch.autograd.grad(method.student_loss(nets, made.batch())["total"].mean(), student)
    batch = made.batch()
    losses, said = method.at_anchor(nets, batch)
    share = 0.02 + 0.96 * batch.generator.rand()
    x = (said.x_t - (said.t - share)[:, None].float() * said.flow).detach()
    second, _ = method.matching(nets, batch, nets.student(x, share, batch.cond).x0, share)
    expected = torch.autograd.grad((losses["total"] + second["matching"]).mean(), student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_the_fake_score_is_told_when_the_student_answered(shared):
    """At every answer, its own and in the critic's turn; untold, it would know the mixture of all places alone."""
    made = world(
        "cdm", schedule="flow", tell_place=True, critic_pull=0.0, shared_samples=shared, augmentation=0.0
    )
    nets, asked, told = made.nets, [], []
    nets.student.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    nets.fake_score.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["end"]), with_kwargs=True
    )
    for step in range(6):
        asked.clear(), told.clear()
        made.method.student_loss(nets, made.batch(step))
        for ours, theirs in zip(asked[-2:], told, strict=True):
            assert torch.equal(ours, theirs)
        answered = asked[-2]
        made.method.critic_loss(nets, made.batch(step, "critic"))
        assert torch.equal(told[2], answered if shared else asked[-1])
    plain = world("cdm", schedule="flow")
    plain.nets.fake_score.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs), with_kwargs=True
    )
    plain.method.student_loss(plain.nets, plain.batch())
    assert told[-1] == {}


@pytest.mark.parametrize("schedule", ["vp", "flow"])
def test_the_fake_score_is_asked_of_no_place_between_that_it_learns_nothing_of(schedule):
    """Untold it knows all places alike, and x' lies anywhere; told, within the range of the grids it learns on."""
    ends = {}
    for told in (False, True):
        made = world(
            "cdm",
            schedule=schedule,
            tell_place=told,
            critic_pull=0.0,
            grid_low=0.4,
            grid_high=0.7,
            augmentation=0.0,
        )
        nets, asked = made.nets, []
        nets.student.register_forward_pre_hook(lambda _, args, asked=asked: asked.append(args[1]))
        heard = []
        nets.fake_score.register_forward_pre_hook(
            lambda _, args, kwargs, heard=heard: heard.append(kwargs.get("end")), with_kwargs=True
        )
        for step in range(6):
            made.method.student_loss(nets, made.batch(step))
            if told:
                assert torch.equal(heard[-1], asked[-1])
            flow = Flow().t_of_rho(nets.schedule.rho(asked[-1]))
            ends[told] = [*ends.get(told, []), float(flow.min()), float(flow.max())]
    # Whole times of a table lie a little beside.
    assert 0.395 < min(ends[True]) < 0.43 and 0.67 < max(ends[True]) < 0.705
    assert min(ends[False]) < 0.1 and max(ends[False]) > 0.9


def test_cdm_refuses_grids_that_are_none():
    for settings, says in (
        ({"most_steps": 0}, r"method\.most_steps"),
        # A grid of so many times is never walked to its end.
        ({"most_steps": 10**8}, r"method\.most_steps"),
        ({"grid_low": 0.95}, r"method\.grid_low"),
        ({"simulated": "counts"}, r"method\.simulated=counts .* leave it out"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("cdm", **settings)
