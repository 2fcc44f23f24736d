"""DMD2 (arXiv 2405.14867): the gradient of its Eq. 2, the critic's two lessons, the GAN on the fake score."""

from __future__ import annotations

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, gradients, world

from stepdistill.denoiser import Denoiser
from stepdistill.features import block_features
from stepdistill.losses import gan_generator
from stepdistill.prediction import Prediction
from stepdistill.rollout import simulate
from stepdistill.schedule import expand


def test_dmd2_without_gan_never_touches_images():
    made = world("dmd2")
    assert not made.method.needs_images
    batch = made.batch()
    assert batch.x0 is None
    for phase in made.method.phases(0):
        for _, loss in phase.terms:
            loss(made.nets, batch)
    assert worlds.method("dmd2", gan_weight=0.1).needs_images


def test_the_students_gradient_is_fake_minus_guided_real():
    """Put together again from the phase's draws: simulate, t, eps; guided teacher, unguided fake score."""
    settings = {"guidance_scale": 3.0, "normalise": True}
    made = world("dmd2", steps=(1,), **settings)
    nets, method = made.nets, made.method
    made.backward(next(iter(method.phases(0))))
    ours = [p.grad.clone() for p in nets.student.parameters()]
    batch = made.batch(phase="student")
    x_t, t, _ = simulate(method.sampling, nets, batch)
    x0 = nets.student(x_t, t, batch.cond).x0
    t = method.times(nets, batch, 0.02, 0.98)
    assert float(t.min()) >= 20 and float(t.max()) < 980
    noisy = nets.schedule.add_noise(x0.detach(), batch.randn(), t)
    cond, uncond = nets.teacher(noisy, t, batch.cond).x0, nets.teacher(noisy, t, batch.uncond).x0
    real, fake = uncond + 3.0 * (cond - uncond), nets.fake_score(noisy, t, batch.cond).x0
    weight = (x0 - real).abs().mean(1, keepdim=True).detach()
    pull = ((fake - real) / weight / x0[0].numel() / COUNT).detach()
    expected = torch.autograd.grad(x0, list(nets.student.parameters()), pull)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_pull_when_the_fake_score_is_the_teacher():
    made = world("dmd2", guidance_scale=1.0)
    made.nets.modules["fake_score"] = made.nets.teacher
    made.backward(next(iter(made.method.phases(0))))
    assert all(float(p.grad.abs().max()) == 0 for p in made.nets.student.parameters())


def test_the_gan_gradient_flows_through_the_frozen_fake_scores_input():
    """With the matching gradient at zero, what is left comes through the critic's input alone."""

    def student_gradient(gan_weight: float) -> float:
        made = world("dmd2", guidance_scale=1.0, gan_weight=1e-9)
        made.method.config.gan_weight = gan_weight
        frozen = made.nets.fake_score

        # Predicts what the teacher does, but keeps its own network for the taps.
        class Agreeing(Denoiser):
            def forward(self, x_t, t, cond=None, **extras):
                inner = super().forward(x_t, t, cond, **extras)
                exact = made.nets.teacher(x_t, t, cond).x0
                return Prediction(exact + 0 * inner.raw.detach(), "x0", x_t, t, inner.schedule)

        made.nets.modules["fake_score"] = Agreeing(frozen.network, frozen.kind, frozen.native)
        made.backward(next(iter(made.method.phases(0))))
        assert not any(gradients(made.nets.fake_score)) and not any(gradients(made.nets.discriminator))
        return sum(float(p.grad.abs().sum()) for p in made.nets.student.parameters())

    assert student_gradient(0.0) == 0
    assert student_gradient(1.0) > 1e-4


@pytest.mark.parametrize("name", ["dmd2", "f_distill"])
def test_beside_a_gan_the_scores_and_their_weight_are_constants_all_the_same(name):
    """The fake score's pass has a graph up to the tapped block and none behind it."""
    made, said = world(name, gan_weight=0.1, student_every=1), []
    for network in (made.nets.teacher, made.nets.fake_score):
        network.register_forward_hook(lambda *call: said.append(call[-1].raw))
    weigh = made.method.weight
    made.method.weight = lambda *asked: said.append(weigh(*asked)) or said[-1]
    losses = made.method.student_loss(made.nets, made.batch())
    real, fake, weight = said
    assert not (real.requires_grad or fake.requires_grad or (weight is not None and weight.requires_grad))
    assert losses["gan"].requires_grad and (weight is None) == (name == "dmd2")


def test_the_critic_learns_both_from_denoising_and_from_the_gan():
    made = world("dmd2", gan_weight=1e-3)
    losses = made.method.critic_loss(made.nets, made.batch(phase="critic"))
    torch.testing.assert_close(losses["total"], losses["denoising"] + 1e-2 * losses["gan"])
    (through,) = torch.autograd.grad(
        losses["gan"].sum(), made.nets.fake_score.network.enter.weight, retain_graph=True
    )
    # The GAN trains the fake score's body as well.
    assert float(through.abs().max()) > 0
    assert not any(p.grad is not None for p in made.nets.student.parameters())
    assert (
        torch.autograd.grad(losses["total"].sum(), made.nets.student.network.enter.weight, allow_unused=True)[
            0
        ]
        is None
    )


def test_the_critic_tells_real_from_generated_and_not_the_reverse():
    made = world("dmd2", gan_weight=1e-3)
    # What the student made.
    made.method.judge = lambda nets, seen, count: torch.full((count, 1), -50.0)
    made.method.real_logits = lambda nets, batch, fake: torch.full((len(fake.x0), 1), 50.0)
    losses = made.method.critic_loss(made.nets, made.batch(phase="critic"))
    assert float(losses["gan"].max()) < 1e-6 and float(losses["accuracy"]) == 1


def test_the_critics_optimum_is_the_students_own_posterior_mean():
    """Denoising on what G makes: the exact denoiser of G's distribution has a lower loss than the teacher."""
    made = world("dmd2", steps=(1,), classes=1, schedule="flow", time_density="lognormal", time_mean=-0.5)
    nets, shift = made.nets, torch.tensor([0.5, -0.3])

    class Shifted(nn.Module):
        def forward(self, x_t, t, cond=None):
            return made.family.data(range(len(x_t)), seed=3) + shift

    class Moved(nn.Module):
        """The teacher's answer, of a mixture moved by `shift`."""

        def forward(self, x_t, t, cond=None):
            alpha = expand(nets.schedule.alpha(t), x_t)
            return nets.teacher(x_t - alpha * shift, t, cond).x0 + shift

    nets.modules["student"] = Denoiser(Shifted(), "x0", nets.schedule)

    def loss(fake: Denoiser) -> float:
        nets.modules["fake_score"] = fake
        return sum(float(made.method.critic_loss(nets, made.batch(i))["total"].mean()) for i in range(20))

    assert loss(Denoiser(Moved(), "x0", nets.schedule)) < 0.9 * loss(nets.teacher)


@pytest.mark.parametrize("which", ["middle", "half", "all"])
def test_dmd2_judges_by_every_block_it_is_told_to_look_at(which):
    made = world("dmd2", steps=(1,), gan_weight=1.0, gan_blocks=which)
    blocks = made.nets.teacher.blocks
    upto = list(blocks).index(made.nets.teacher.middle)
    count = {"middle": 1, "half": upto + 1, "all": len(blocks)}[which]
    heads = made.nets.discriminator.heads
    assert len(heads) == count
    made.method.critic_loss(made.nets, made.batch(0, "critic"))["total"].mean().backward()
    assert all(head.leave.weight.grad.abs().sum() > 0 for head in heads)


@pytest.mark.parametrize("name", ["dmd2", "f_distill"])
def test_the_discriminator_meets_real_and_generated_data_under_one_law(name, monkeypatch):
    """Noise level or condition alone must not tell which is which."""
    from stepdistill.methods import judged

    settings = {"gan_weight": 1.0, "critic_density": "lognormal", "time_mean": -2.0, "time_std": 0.01}
    made, real, fake = world(name, **settings | {"critic_dropout": 1.0}), [], []
    original, score = judged.block_features, made.nets.fake_score.forward

    def features(net, x_t, t, cond, blocks):
        real.append((t, cond))
        return original(net, x_t, t, cond, blocks)

    def forward(x_t, t, cond=None, **more):
        fake.append((t, cond))
        return score(x_t, t, cond, **more)

    monkeypatch.setattr(judged, "block_features", features)
    made.nets.fake_score.forward = forward
    batch = made.batch(phase="critic")
    made.method.critic_loss(made.nets, batch)
    for t, cond in (real[0], fake[0]):
        assert float((made.nets.schedule.rho(t).log() + 2).abs().max()) < 0.2
        assert torch.equal(cond, batch.uncond)


def test_of_a_guided_fake_score_the_conditional_half_is_judged():
    made = world("dmd2", steps=(1,), gan_weight=1.0, fake_guidance_scale=2.0)
    nets, method = made.nets, made.method
    losses, batch = method.student_loss(nets, made.batch()), made.batch()
    x_t, t = method.diffuse(nets, batch, method.generate(nets, batch).x0)
    blocks = [nets.fake_score.middle]
    conditional, unconditional = (
        gan_generator(*nets.discriminator(block_features(nets.fake_score, x_t, t, cond, blocks)))
        for cond in (batch.cond, batch.uncond)
    )
    torch.testing.assert_close(losses["gan"], conditional)
    assert not torch.allclose(conditional, unconditional, rtol=1e-3)


@pytest.mark.parametrize("paired", [False, True])
def test_the_critic_learns_on_shared_samples_of_another_size_than_its_images(paired):
    """Each phase draws a bucket of its own."""
    made = world("dmd2", steps=(1,), shared_samples=True, gan_weight=0.1, gan_paired=paired)
    made.method.student_loss(made.nets, made.batch())
    batch, seen = made.batch(phase="critic"), []
    # The toy's networks know one size: what they are asked of is enough.
    made.nets.fake_score.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    batch.shape = (2, 1)
    batch.x0 = batch.x0[:, :, None]
    with pytest.raises(RuntimeError):
        made.method.critic_loss(made.nets, batch)
    assert seen == [(16, 2), (16, 2, 1)]
