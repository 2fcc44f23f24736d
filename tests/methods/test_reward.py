"""Reward feedback: up to the margin and no further, late steps, the anchor, what a reward must be."""

from __future__ import annotations

import pytest
import torch
import worlds
from worlds import world

from stepdistill.errors import UserError
from stepdistill.prediction import Prediction
from stepdistill.schedule import times_like


def reward(steps=(1, 2), **settings):
    return world("reward", steps=steps, **{"reward": "worlds:Towards"} | settings)


def test_no_gradient_where_the_score_has_reached_the_margin():
    """Margin 0 is never reached by -|x - a|^2, margin -1000 always is."""
    made = reward(margin=-1000.0)
    made.backward(next(iter(made.method.phases(0))))
    assert all(float(p.grad.abs().max()) == 0 for p in made.nets.student.parameters())
    made = reward(margin=0.0, steps=(1,))
    made.backward(next(iter(made.method.phases(0))))
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    x = made.nets.schedule.first_state(_first_draw(made), made.nets.schedule.t_max)
    x0 = made.nets.student(x, times_like(made.nets.schedule.t_max, x), made.batch().cond).x0
    expected = torch.autograd.grad(
        (x0 - torch.tensor([2.0, 0.0])).square().sum(1).mean(), list(made.nets.student.parameters())
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _first_draw(made):
    batch = made.batch()
    batch.generator.shared_randint(0, 1)
    return batch.randn()


def test_part_of_a_batch_beyond_the_margin_gets_no_gradient():
    made = reward(margin=0.0, steps=(1,))
    scores = made.method.loss(made.nets, made.batch())["score"].detach()
    made.method.config.margin = margin = float(scores.median())
    losses = made.method.loss(made.nets, made.batch())
    reached = scores >= margin
    assert bool(reached.any()) and not bool(reached.all())
    torch.testing.assert_close(losses["total"], (margin - scores).clamp(min=0))
    assert torch.equal(losses["short"] == 0, reached)


def test_only_late_steps_are_rewarded():
    made = reward(steps=(4,), late=0.5)
    heard = []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((float(t[0]), torch.is_grad_enabled()))
        or Prediction(0.5 * x_t, "x0", x_t, t, made.nets.schedule)
    )
    rewarded = set()
    for step in range(12):
        heard.clear()
        made.method.loss(made.nets, made.batch(step))
        assert [grad for _, grad in heard] == [False] * (len(heard) - 1) + [True]
        rewarded.add(heard[-1][0])
    assert rewarded == {499.0, 249.0}


def test_the_reward_hears_the_prompts_of_its_images():
    made = reward()
    batch = made.batch()
    made.method.loss(made.nets, batch)
    assert made.method.model.heard[-1] == list(batch.prompts)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("wrong", r"one score per image, shape \(16,\), got \(16, 1\)"),
        ("number", "got float"),
        ("detached", "without a gradient"),
    ],
)
def test_a_reward_of_the_wrong_shape_is_refused(shape, says):
    made = reward(arguments={"shape": shape})
    with pytest.raises(UserError, match=says):
        made.method.loss(made.nets, made.batch())


def test_what_a_reward_cannot_be_made_of_is_said():
    with pytest.raises(UserError, match="unknown reward 'clap'"):
        worlds.method("reward", reward="clap")
    with pytest.raises(UserError, match=r"method\.arguments do not fit"):
        _ = worlds.method("reward", reward="worlds:Towards", arguments={"shap": 1}).model
    made = reward()
    batch = made.batch()
    batch.prompts = None
    with pytest.raises(UserError, match="this run has none"):
        made.method.loss(made.nets, batch)


def test_a_reward_raises_the_score_up_to_its_margin_and_then_lets_go():
    """The toy proof: all of the student's points come to within the margin's circle, and stop there."""
    made = reward(margin=-0.5, steps=(1,))
    optimizer = torch.optim.Adam(made.nets.student.parameters(), 3e-3)
    shorts, scores = [], []
    for step in range(150):
        (phase,) = made.method.phases(step)
        losses = made.method.loss(made.nets, made.batch(step))
        shorts.append(float(losses["short"].mean()))
        scores.append(float(losses["score"].detach().mean()))
        made.backward(phase, step)
        optimizer.step()
    assert sum(shorts[:5]) / 5 > 0.6 and sum(shorts[-20:]) / 20 < 0.15
    # Not climbed to the top, which is 0.
    assert sum(scores[-20:]) / 20 < -0.1


def test_the_anchor_holds_the_student_where_it_was():
    made = reward(margin=-1000.0, anchor_weight=2.0)
    losses = made.method.loss(made.nets, made.batch())
    # The world has moved the student since.
    assert float(losses["anchor"].mean().detach()) > 0
    torch.testing.assert_close(losses["total"], 2.0 * losses["anchor"])
    made.nets.modules["start"] = made.nets.student
    assert float(made.method.loss(made.nets, made.batch())["total"].max().detach()) == 0


def test_the_micro_clip_tells_a_caption_from_another_and_has_a_gradient():
    from stepdistill import scenes
    from stepdistill.rewards import ClipReward, scores

    drawn = [scenes.image_at(i) for i in range(8)]
    images = torch.stack([torch.from_numpy(image.copy()) for _, image in drawn]).permute(0, 3, 1, 2) / 255
    images.requires_grad_()
    captions = [scene.caption for scene, _ in drawn]
    clip = ClipReward()
    own, other = (
        scores(clip, "clip", images, captions),
        scores(clip, "clip", images, captions[1:] + captions[:1]),
    )
    assert float((own > other).float().mean()) == 1 and float(own.min().detach()) > 0.5
    (slope,) = torch.autograd.grad(own.sum(), images)
    assert bool((slope.flatten(1).norm(dim=1) > 0).all())
    from evaluation.metrics.clip_score import ClipScore

    theirs = ClipScore().cosines([(images.detach() * 255).round().to(torch.uint8)], captions)
    torch.testing.assert_close(own.detach(), theirs, rtol=1e-4, atol=1e-4)
