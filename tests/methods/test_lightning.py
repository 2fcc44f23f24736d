"""SDXL-Lightning (arXiv 2402.13929): the predecessor's steps, both discriminators, the encoder."""

from __future__ import annotations

import pytest
import torch
import worlds
from worlds import world

from stepdistill.discriminator import (
    chosen_blocks,
)
from stepdistill.errors import UserError
from stepdistill.features import block_features
from stepdistill.sampling import Sampling


def lightning(steps=(2,), schedule: str = "vp", **settings):
    return world("lightning", steps=steps, schedule=schedule, **settings)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_lightnings_real_is_the_predecessors_sampler_from_the_same_place(schedule):
    made = lightning(ratio=3, schedule=schedule)
    nets, method, batch = made.nets, made.method, made.batch()
    i, x_t = method.start(nets, batch)
    real = method.real(nets, batch, i, x_t)
    grid = method.sampling.grid(nets.schedule, 6)
    for position in (0, 1):
        rows = i == position
        x, cond = x_t[rows], batch.cond[rows]
        start, walked = 3 * position, None
        with torch.no_grad():
            if position == 0:
                walked = Sampling(rule="ode").walk(nets.predecessor, x, grid[: start + 4], None, cond)
            else:
                # To the end: a sampler's last step is x0 itself.
                walked = Sampling(rule="ode").sample(nets.predecessor, x, grid[start:], None, cond)
        torch.testing.assert_close(real[rows], walked, rtol=1e-4, atol=1e-5)
    assert set(i.tolist()) == {0, 1}


def test_the_student_that_is_its_own_predecessor_makes_what_is_real():
    made = lightning(ratio=1, mse_weight=1.0, gan_weight=0.0)
    made.nets.modules["predecessor"] = made.nets.student
    losses = made.method.student_loss(made.nets, made.batch())
    assert float(losses["total"].max().detach()) < 1e-10
    # No discriminator without its game.
    assert [phase.trains for phase in made.method.phases(0)] == [("student",)]


def test_lightnings_error_is_weighed_and_its_relativistic_student_set_beside_what_is_real():
    made = lightning(gan="relativistic", mse_weight=0.3, gan_weight=0.7)
    losses, batch = made.method.student_loss(made.nets, made.batch()), made.batch()
    i, x_t = made.method.start(made.nets, batch)
    x_s, _ = made.method.generate(made.nets, batch, i, x_t)
    real = made.method.real(made.nets, batch, i, x_t)
    (fake,), (beside,) = (made.method.logits(made.nets, batch, i, x_t, x) for x in (x_s, real))
    torch.testing.assert_close(losses["error"], (x_s - real).square().mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["gan"], torch.nn.functional.softplus(beside - fake).mean(1))
    torch.testing.assert_close(losses["total"], 0.3 * losses["error"] + 0.7 * losses["gan"])
    # The discriminator plays the same game from the other side.
    told = made.method.discriminator_loss(made.nets, made.batch())["gan"]
    torch.testing.assert_close(told, torch.nn.functional.softplus(fake - beside).mean(1))


def test_a_conditional_discriminator_sees_both_ends_of_the_step_and_the_other_only_the_latter():
    for conditional in (True, False):
        made = lightning(conditional=conditional)
        batch = made.batch()
        i, x_t = made.method.start(made.nets, batch)
        x_s, _ = made.method.generate(made.nets, batch, i, x_t)
        x_t, x_s = x_t.detach().requires_grad_(), x_s.detach().requires_grad_()
        (logits,) = made.method.logits(made.nets, batch, i, x_t, x_s)
        by_t, by_s = torch.autograd.grad(logits.sum(), (x_t, x_s), allow_unused=True)
        assert float(by_s.abs().max()) > 0 and (by_t is not None) == conditional
        # The features are the encoder's own at (x, t).
        middle = [made.nets.encoder.middle]
        seen = [
            block_features(
                made.nets.encoder, x_s, made.method.at(made.nets.schedule, i + 1, 1), batch.cond, middle
            )[0]
        ]
        if conditional:
            seen += block_features(
                made.nets.encoder, x_t, made.method.at(made.nets.schedule, i, 1), batch.cond, middle
            )
        torch.testing.assert_close([logits], made.nets.discriminator([torch.cat(seen, 1)]))


def test_the_encoder_is_the_teachers_first_half_with_weights_of_its_own(tiny_sd):
    from stepdistill.denoiser import parameter_count
    from stepdistill.families.sd import SD

    teacher = SD(SD.Config(teacher=str(tiny_sd))).teacher
    encoder = teacher.encoder()
    assert parameter_count(encoder) < 0.8 * parameter_count(teacher)
    x, t, cond = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([10.0, 700.0], dtype=torch.float64),
        torch.randn(2, 7, 16),
    )
    names = list(chosen_blocks(teacher, "half"))
    for a, b in zip(*(block_features(each, x, t, cond, names) for each in (teacher, encoder)), strict=True):
        assert torch.equal(a, b)
    block_features(encoder, x, t, cond, names[-1:])[0].sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_unconditional_stage_goes_on_with_the_same_predecessor():
    before, after = lightning(), lightning(predecessor="same", conditional=False)
    assert after.method.carried == ("predecessor",) and before.method.carried == ()
    # All keys match.
    after.nets.predecessor.load_state_dict(before.nets.predecessor.state_dict())


def test_lightning_refuses_what_makes_no_sense():
    for settings, steps, says in (
        ({}, (1, 2), "one number per stage"),
        ({"ratio": 0}, (1,), r"method\.ratio must be at least 1"),
        ({"gan_weight": 0.0}, (1,), "both 0"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("lightning", steps=steps, **settings)
