"""SiDA (arXiv 2410.14919): SiD and a discriminator on the fake score's encoder, both at one x_t."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
import worlds
from quadrature import Line
from worlds import gradients, world

from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES
from stepdistill.features import block_features
from stepdistill.losses import score_identity
from stepdistill.methods.f_distill import WEIGHTS


def sida(**settings):
    return world("sida", steps=(1,), **settings)


def parts(made, phase="student"):
    """x0, x_t, t and the logits of one batch, put together again."""
    batch, nets = made.batch(phase=phase), made.nets
    x0 = made.method.generate(nets, batch).x0
    x_t, t = made.method.diffuse(nets, batch, x0)
    blocks = list(made.method.eye(nets.fake_score))
    logits = nets.discriminator(block_features(nets.fake_score, x_t, t, batch.cond, blocks))
    return batch, x0, x_t, t, logits


def test_the_students_gradient_is_sids_plus_the_discriminators_through_the_encoder():
    made = sida(gan_weight=0.3, normalise=False)
    student = list(made.nets.student.parameters())
    ours = torch.autograd.grad(made.method.student_loss(made.nets, made.batch())["total"].mean(), student)
    batch, x0, x_t, t, (logits,) = parts(made)
    real, fake = made.nets.teacher(x_t, t, batch.cond).x0, made.nets.fake_score(x_t, t, batch.cond).x0
    loss = score_identity(x0, real, fake, 1.0, normalise=False).mean() + 0.3 * nnf.softplus(-logits).mean()
    expected = torch.autograd.grad(loss, student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    # The adversarial part is no small change.
    alone = torch.autograd.grad(score_identity(*score_parts(made), 1.0, normalise=False).mean(), student)
    assert max(float((a - b).abs().max()) for a, b in zip(alone, ours, strict=True)) > 1e-4


def score_parts(made):
    batch, x0, x_t, t, _ = parts(made)
    return x0, made.nets.teacher(x_t, t, batch.cond).x0, made.nets.fake_score(x_t, t, batch.cond).x0


def test_where_the_scores_agree_only_the_discriminator_pulls():
    made = sida(gan_weight=0.3)
    made.nets.modules["fake_score"] = made.nets.teacher.backbone()
    made.nets.modules["teacher"] = made.nets.fake_score
    losses = made.method.student_loss(made.nets, made.batch())
    assert float(losses["matching"].detach().abs().max()) == 0
    student = list(made.nets.student.parameters())
    ours = torch.autograd.grad(losses["total"].mean(), student)
    _, _, _, _, (logits,) = parts(made)
    expected = torch.autograd.grad(0.3 * nnf.softplus(-logits).mean(), student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_without_its_discriminator_it_is_sid():
    made, plain = sida(gan_weight=0.0), world("sid", steps=(1,), alpha=1.0)
    assert "discriminator" not in made.nets.modules and not made.method.needs_images
    losses = [each.method.student_loss(each.nets, each.batch())["total"] for each in (made, plain)]
    torch.testing.assert_close(*losses)


def test_real_and_generated_samples_are_judged_at_one_level_and_noise():
    """And each is half a binary cross entropy, beside the denoising of the generated ones."""
    made, seen = sida(critic_dropout=0.5), []
    nets, method = made.nets, made.method
    forward = nets.fake_score.forward
    nets.fake_score.forward = lambda x_t, t, *rest: seen.append((x_t, t, *rest)) or forward(x_t, t, *rest)
    losses = method.critic_loss(nets, made.batch(phase="critic"))
    (x_fake, t_fake, c_fake), (x_real, t_real, c_real) = seen[0][:3], seen[-1][:3]
    assert torch.equal(t_fake, t_real) and torch.equal(c_fake, c_real)
    alpha = nets.schedule.alpha(t_fake)[:, None]
    batch = made.batch(phase="critic")
    x0 = method.generate(nets, batch).x0.detach()
    # The same noise: the states differ as the data do.
    torch.testing.assert_close(x_real - x_fake, (alpha * (batch.x0 - x0)).float(), rtol=1e-4, atol=1e-4)
    blocks = list(method.eye(nets.fake_score))
    (fake,), (real,) = (
        nets.discriminator(block_features(nets.fake_score, x, t_fake, c_fake, blocks))
        for x in (x_fake, x_real)
    )
    expected = (nnf.softplus(fake) + nnf.softplus(-real)).mean(1)
    torch.testing.assert_close(losses["gan"], expected)
    torch.testing.assert_close(losses["total"], losses["denoising"] + 0.5 * expected)


def test_the_critics_turn_trains_encoder_and_head_and_leaves_the_rest():
    made = sida()
    for phase in made.method.phases(0):
        made.backward(phase)
        for name, module in made.nets.modules.items():
            assert all(gradients(module)) == (name in phase.trains and name != "teacher") or name == "teacher"


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "hellinger", "softened_kl"])
def test_uni_instructs_gradient_is_that_of_the_divergence_at_a_noise_level(divergence):
    """For alpha 1/2 and the exact ratio: d / d theta of E h(r) |s_student - s_data|^2, everything differentiated."""
    line = Line("sid", SCHEDULES["flow"](), nodes=121)
    wide = {"ratio_low": 1e-12, "ratio_high": 1e12}
    method = worlds.method("sida", divergence=divergence, gan_weight=1.0, **wide)
    shift, scale = line.student.shift, line.student.scale
    x0 = (shift + scale * line.z)[:, None]
    t = line.t.expand(len(x0))
    x_t = line.schedule.add_noise(x0, line.eps[:, None], t)
    real, fake = (line.nets.modules[name](x_t, t).x0 for name in ("teacher", "fake_score"))
    log_ratio = line.data.log_prob(x_t, t) - line.nets.fake_score.network.log_prob(x_t, t)
    h, slope = method.weights(log_ratio)
    unit = WEIGHTS[divergence](log_ratio.detach().exp()).mean()
    loss = score_identity(x0, real, fake, 0.5, False, unit * h, unit * slope)
    ours = torch.stack(torch.autograd.grad((line.weights * loss).sum(), (shift, scale)))

    def integrand(log_q, log_p):
        (apart,) = torch.gradient(log_p - log_q, spacing=28 / 20000)
        return log_q.exp() * WEIGHTS[divergence]((log_p - log_q).exp()) * apart.square()

    expected = line.density_gradient(integrand) * (line.sigma**2 / line.alpha) ** 2 / 2
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-5)


def test_the_reverse_kl_is_sida_itself_and_others_need_the_discriminator():
    plain, same = sida(gan_weight=0.3), sida(gan_weight=0.3, divergence="reverse_kl")
    a, b = (made.method.student_loss(made.nets, made.batch())["total"] for made in (plain, same))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"method\.divergence=forward_kl"):
        sida(gan_weight=0.0, divergence="forward_kl")


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("shared", [False, True])
def test_real_samples_are_judged_beside_their_own_conditions(shared, share):
    """Shared samples bring the student's captions into the critic's turn, whose images have others; as many are dropped."""
    made = sida(shared_samples=shared, gan_weight=0.3, critic_dropout=share)
    nets, method, told = made.nets, made.method, []
    method.student_loss(nets, made.batch())
    batch = made.batch(phase="critic")
    student, batch.cond = batch.cond, batch.cond.flip(0)
    assert not torch.equal(student, batch.cond)
    nets.fake_score.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    method.critic_loss(nets, batch)
    fake, real = told[0], told[-1]
    dropped = fake == batch.uncond
    assert (int(dropped.sum()) > 0) == (share > 0)
    assert torch.equal(real, batch.cond.where(~dropped, batch.uncond))
    assert torch.equal(fake, (student if shared else batch.cond).where(~dropped, batch.uncond))


@pytest.mark.parametrize("name", ["sida", "f_distill"])
def test_one_sample_cannot_be_weighed_against_others(name):
    made = world(name, steps=(1,), divergence="forward_kl", gan_weight=0.1)
    made.method.student_loss(made.nets, made.batch(count=2))
    with pytest.raises(UserError, match=r"method\.divergence=forward_kl .* set optim\.micro_batch_size"):
        made.method.student_loss(made.nets, made.batch(count=1))
    made = world(name, steps=(1,), divergence="reverse_kl", gan_weight=0.1)
    made.method.student_loss(made.nets, made.batch(count=1))
