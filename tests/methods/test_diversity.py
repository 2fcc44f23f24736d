"""The diversity anchor: a student's first step goes where the teacher's own steps go from the same noise."""

from __future__ import annotations

import itertools

import pytest
import torch
from worlds import COUNT, world

from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.schedule import times_like

METHODS = pytest.mark.parametrize("name", ["dmd2", "dmd", "vsd", "sim", "decoupled_dmd", "cdm"])


@METHODS
def test_the_anchor_is_a_term_of_every_score_distillation(name):
    made = world(name, steps=(2, 4), diversity_weight=0.05, student_every=1)
    (phase, *_) = made.method.phases(0)
    weights = [weight for weight, loss in phase.terms if loss == made.method.diversity_loss]
    assert phase.name == "student" and weights == [0.05]
    (phase, *_) = world(name, steps=(2, 4), student_every=1).method.phases(0)
    assert all(loss.__name__ != "diversity_loss" for _, loss in phase.terms)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_is_the_velocity_to_where_the_guided_teacher_is_after_five_of_thirty_steps(guidance):
    """In flow, from pure noise: |v - (eps - x_a) / (1 - a)|^2, x_a by Euler steps, a = 25/30."""
    made = world("dmd2", steps=(2,), schedule="flow", diversity_weight=0.05, diversity_guidance=guidance)
    nets = made.nets
    losses, batch = made.method.diversity_loss(nets, made.batch()), made.batch()
    eps = batch.randn()
    x, times = eps, [1 - k / 30 for k in range(6)]
    for t, s in itertools.pairwise(times):
        said = guided(nets.teacher, x, times_like(t, x), batch.cond, batch.uncond, guidance)
        x = x + (s - t) * said.flow
    wanted = (eps - x) / (1 - times[-1])
    v = nets.student(eps, times_like(1.0, eps), batch.cond).flow
    torch.testing.assert_close(losses["anchor"], (v - wanted).square().mean(1), rtol=1e-3, atol=1e-5)
    student = list(nets.student.parameters())
    ours = torch.autograd.grad(losses["total"].mean(), student)
    expected = torch.autograd.grad((v - wanted.detach()).square().mean(), student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["dmd2", "decoupled_dmd", "cdm"])
def test_unless_it_is_set_it_is_guided_as_the_student_is(name):
    """What CA adds is guidance too: told + a (told - untold), with DM's teacher unguided."""
    settings = {"augmentation": 2.5} if name != "dmd2" else {"guidance_scale": 3.5}
    both = []
    for own in (0.0, 3.5):
        made = world(
            name, steps=(2, 4), schedule="flow", diversity_weight=0.05, diversity_guidance=own, **settings
        )
        both.append(made.method.diversity_loss(made.nets, made.batch())["anchor"])
    assert torch.equal(*both)
    batch = made.batch()
    batch.uncond = None
    assert made.method.guidance(batch) == (3.5 if name == "dmd2" else 1.0)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_a_student_that_steps_as_the_teacher_does_has_no_anchor_loss(schedule):
    made = world(
        "dmd2", steps=(2,), schedule=schedule, diversity_weight=1.0, guidance_scale=1.0, first_rho=5.0
    )
    seen = []
    plain = made.nets.student.forward

    def forward(x_t, t, cond=None):
        seen.append((x_t, t))
        return plain(x_t, t, cond)

    made.nets.student.forward = forward
    made.method.diversity_loss(made.nets, made.batch())
    # One answer, at the student's own first state; a teacher's chord of one short step is the teacher's own answer.
    ((_, t),) = seen
    assert set(t.tolist()) == {made.method.sampling.grid(made.nets.schedule, 2)[0]}
    made.nets.modules["student"] = made.nets.teacher
    short = world(
        "dmd2", steps=(2,), schedule=schedule, diversity_weight=1.0, guidance_scale=1.0, first_rho=5.0,
        diversity_steps=1, diversity_grid=200,
    )  # fmt: skip
    short.nets.modules["student"] = short.nets.teacher
    assert float(short.method.diversity_loss(short.nets, short.batch())["anchor"].max()) < 1e-5


@pytest.mark.parametrize("name", ["dmd2", "decoupled_dmd", "cdm"])
def test_the_scores_act_on_later_steps_alone(name):
    made = world(name, steps=(2, 4), diversity_weight=0.05, schedule="flow")
    asked = []
    plain = made.nets.student.forward

    def forward(x_t, t, cond=None, **more):
        if torch.is_grad_enabled():
            asked.append(float(t[0]))
        return plain(x_t, t, cond, **more)

    made.nets.student.forward = forward
    for step in range(12):
        if name == "cdm" and len(made.method.grid(made.nets.schedule, made.batch(step))) == 1:
            continue
        before = len(asked)
        made.method.student_loss(made.nets, made.batch(step))
        assert asked[before] < 1


def test_one_step_has_no_later_step_to_leave_to_the_scores():
    with pytest.raises(UserError, match=r"method\.diversity_weight=0.05 .*steps of at least 2, got \[1, 2\]"):
        world("dmd2", steps=(1, 2), diversity_weight=0.05)
    with pytest.raises(UserError, match=r"method\.diversity_steps must be at least 1 and below"):
        world("dmd2", diversity_steps=30)


def test_scores_that_part_are_told_by_cosine_and_size():
    made = world("dmd2", steps=(1,), guidance_scale=1.0)
    same = made.method.student_loss(made.nets, made.batch())
    made.nets.modules["fake_score"] = made.nets.teacher
    apart = made.method.student_loss(made.nets, made.batch())
    assert float(apart["scores_apart"].max()) == 0 and float(apart["scores_cosine"].min()) > 0.999
    assert float(same["scores_apart"].min()) > 0.01 and float(same["scores_cosine"].min()) < 0.999
    assert same["scores_apart"].shape == (COUNT,)
