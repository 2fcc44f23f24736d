"""Losses against closed forms; DMD's surrogate against the KL gradient by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from stepdistill.families.toy import Mixture
from stepdistill.losses import (
    denoising,
    distribution_matching,
    gan_discriminator,
    gan_generator,
    hinge_discriminator,
    mse,
    pseudo_huber,
    score_identity,
    vector_huber,
)
from stepdistill.prediction import Prediction
from stepdistill.schedule import EDM, VP, Flow


def triple(seed: int = 0, shape=(6, 3, 4)):
    generator = torch.Generator().manual_seed(seed)
    x0, teacher, fake = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return x0.requires_grad_(), teacher, fake


def gradient(x0, teacher, fake, normalise=True) -> torch.Tensor:
    """Of the sum over samples: what one sample's loss does to that sample."""
    return torch.autograd.grad(distribution_matching(x0, teacher, fake, normalise).sum(), x0)[0]


@pytest.mark.parametrize("normalise", [False, True])
def test_the_surrogates_gradient_is_fake_minus_real(normalise):
    x0, teacher, fake = triple()
    weight = (x0 - teacher).abs().mean((1, 2), keepdim=True).detach() if normalise else 1.0
    expected = (fake - teacher) / weight / x0[0].numel()
    torch.testing.assert_close(gradient(x0, teacher, fake, normalise), expected, rtol=1e-12, atol=1e-14)


def test_no_gradient_where_the_fake_agrees_with_the_teacher():
    x0, teacher, _ = triple()
    # The second: even where the normaliser is 0.
    for real in (teacher, x0.detach()):
        assert torch.equal(gradient(x0, real, real.clone()), torch.zeros_like(x0))


def test_no_gradient_reaches_the_networks():
    x0, teacher, fake = triple()
    teacher, fake = teacher.requires_grad_(), fake.requires_grad_()
    distribution_matching(x0, teacher, fake).sum().backward()
    assert teacher.grad is None and fake.grad is None


def test_the_normaliser_is_invariant_to_scale():
    """(x0 - real) and (fake - real) multiplied by c: the gradient does not change."""
    x0, teacher, fake = triple()
    base = gradient(x0, teacher, fake)
    for c in (1e-2, 7.0):
        real = x0.detach() - c * (x0.detach() - teacher)
        torch.testing.assert_close(
            gradient(x0, real, real + c * (fake - teacher)), base, rtol=1e-9, atol=1e-12
        )


def test_the_gradient_is_of_each_sample_alone():
    x0, teacher, fake = triple()
    alone = torch.cat([gradient(x0[i : i + 1], teacher[i : i + 1], fake[i : i + 1]) for i in range(len(x0))])
    torch.testing.assert_close(gradient(x0, teacher, fake), alone, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------- the KL gradient, by quadrature

MEANS, STD, WEIGHTS = torch.tensor([[-1.0], [0.8]]), 0.4, torch.tensor([0.35, 0.65])


def hermite(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of E[f(z)], z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def kl(a: torch.Tensor, b: torch.Tensor, schedule, t: torch.Tensor) -> torch.Tensor:
    """KL(q_t || p_t) of the generator x0 = a + b z, z ~ N(0, 1), against the mixture, both at t."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    nodes, weights = hermite(160)
    spread = (alpha**2 * b**2 + sigma**2).sqrt()
    x_t = alpha * a + spread * nodes
    log_p = Mixture(schedule, MEANS, STD, WEIGHTS).log_prob(x_t[:, None], t.expand(len(x_t)))
    return -(0.5 + 0.5 * math.log(2 * math.pi) + spread.log()).sum() - (weights * log_p).sum()


def surrogate(a: torch.Tensor, b: torch.Tensor, schedule, t: torch.Tensor) -> torch.Tensor:
    """E over z and eps of the surrogate, unnormalised, with the exact fake score of the generator."""
    nodes, weights = hermite(100)
    z, eps = (grid.flatten() for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).flatten()
    x0 = (a + b * z)[:, None]
    times = t.expand(len(x0))
    x_t = schedule.add_noise(x0.detach(), eps[:, None], times)
    real = Mixture(schedule, MEANS, STD, WEIGHTS)(x_t, times)
    fake = Mixture(schedule, a.detach().reshape(1, 1), float(b.detach()))(x_t, times)
    return (weight * distribution_matching(x0, real, fake, normalise=False)).sum()


@pytest.mark.parametrize(("schedule", "t"), [(EDM(), 0.9), (VP.from_betas(), 450.0), (Flow(), 0.5)])
def test_the_surrogates_gradient_is_the_kl_gradient(schedule, t):
    """Mean and scale of a 1-D Gaussian generator: the x0 form is sigma^2 / alpha^2 times d KL / d theta.

    dx_t / dx0 = alpha, and the x0 form is sigma^2 / alpha times the score form; together sigma^2 / alpha^2.
    """
    time = torch.tensor([t], dtype=torch.float64)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.7))
    true = torch.stack(torch.autograd.grad(kl(a, b, schedule, time), (a, b)))
    ours = torch.stack(torch.autograd.grad(surrogate(a, b, schedule, time), (a, b)))
    scale = float(schedule.rho(time) ** 2)
    # Both parameters have somewhere to go.
    assert float(true.abs().min()) > 1e-3
    torch.testing.assert_close(ours / scale, true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("schedule", "t"), [(EDM(), 0.9), (VP.from_betas(), 450.0), (Flow(), 0.5)])
def test_the_x0_form_is_sigma_squared_over_alpha_times_the_score_form(schedule, t):
    x_t = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    time = torch.full((13,), t, dtype=torch.float64)
    real, fake = Mixture(schedule, MEANS, STD, WEIGHTS), Mixture(schedule, MEANS[:1], 0.7)
    said = [Prediction(network(x_t, time), "x0", x_t, time, schedule) for network in (fake, real)]
    factor = float(schedule.sigma(time)[0] ** 2 / schedule.alpha(time)[0])
    torch.testing.assert_close(
        said[0].x0 - said[1].x0, factor * (said[0].score - said[1].score), rtol=1e-9, atol=1e-11
    )


# -------------------------------------------------------------------------------------------------- the rest


def noised(schedule, t):
    generator = torch.Generator().manual_seed(3)
    x0, eps, wrong = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    time = torch.full((5,), t, dtype=torch.float64)
    return x0, eps, wrong, time, schedule.add_noise(x0, eps, time)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize(("schedule", "t"), [(EDM(), 0.9), (VP.from_betas(), 450.0), (Flow(), 0.5)])
def test_denoising_is_zero_at_the_truth_and_measured_in_the_networks_kind(kind, schedule, t):
    x0, eps, wrong, time, x_t = noised(schedule, t)
    truth = Prediction(x0, "x0", x_t, time, schedule)
    exact = Prediction(getattr(truth, kind), kind, x_t, time, schedule)
    assert float(denoising(exact, x0, eps).max()) < 1e-20
    off = Prediction(exact.raw + wrong, kind, x_t, time, schedule)
    weight = schedule.rho(time) ** -2 + 1 / 0.5**2 if kind == "x0" else torch.ones_like(time)
    torch.testing.assert_close(denoising(off, x0, eps, sigma_data=0.5), weight * wrong.square().mean(1))


def test_edms_weight_is_the_published_one_and_cancels_the_output_scale():
    """(s^2 + d^2) / (s d)^2 = 1 / s^2 + 1 / d^2, which times c_out^2 is 1 at every noise level."""
    schedule, data = EDM(), 0.5
    for sigma in (0.01, 0.3, 2.0, 60.0):
        x0, eps, wrong, time, x_t = noised(schedule, sigma)
        c_out = sigma * data / (sigma**2 + data**2) ** 0.5
        said = Prediction(x0 + c_out * wrong, "x0", x_t, time, schedule)
        torch.testing.assert_close(denoising(said, x0, eps, data), wrong.square().mean(1), rtol=1e-9, atol=0)
        published = (sigma**2 + data**2) / (sigma * data) ** 2
        near = Prediction(x0 + wrong, "x0", x_t, time, schedule)
        torch.testing.assert_close(
            denoising(near, x0, eps, data), published * wrong.square().mean(1), rtol=1e-9, atol=0
        )


def test_pseudo_huber_is_quadratic_below_and_linear_above():
    zero, c = torch.zeros(1, 4, dtype=torch.float64), 1e-3
    for distance, expected in ((1e-6, 1e-12 / (2 * c)), (10.0, 10.0 - c)):
        assert float(pseudo_huber(zero + distance, zero, c)) == pytest.approx(expected, rel=1e-5)
    assert float(pseudo_huber(zero, zero, c)) == 0
    # Elementwise, then averaged: one far element of four counts a quarter.
    far = torch.tensor([[8.0, 0, 0, 0]], dtype=torch.float64)
    assert float(pseudo_huber(far, zero, c)) == pytest.approx((8 - c) / 4, rel=1e-6)


def test_sids_normaliser_is_a_constant():
    """The gradient, through x0 and both answers to it, is divided by mean |x0 - teacher|, which has none of its own."""
    x0, teacher, fake = triple()
    slopes = []
    for normalise in (False, True):
        loss = score_identity(x0, teacher + 0.3 * x0, fake + 0.2 * x0, 1.2, normalise)
        slopes.append(torch.autograd.grad(loss.sum(), x0)[0])
    size = (x0 - teacher - 0.3 * x0).detach().abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(slopes[1], slopes[0] / size, rtol=1e-9, atol=1e-12)


def test_the_vector_huber_is_of_the_norm_of_the_whole_sample():
    off = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    for c in (0.0, 2.0):
        expected = (25 + c * c) ** 0.5 - c
        assert float(vector_huber(off, torch.zeros_like(off), c)) == pytest.approx(expected, rel=1e-12)
    assert float(vector_huber(off, off, 0.0)) < 1e-7


def test_gan_losses_at_zero_and_far_logits():
    zero = torch.zeros(3, 5)
    torch.testing.assert_close(gan_generator(zero), torch.full((3,), math.log(2)))
    torch.testing.assert_close(gan_discriminator(zero, zero), torch.full((3,), math.log(4)))
    right, wrong = torch.full((3, 5), 50.0), torch.full((3, 5), -50.0)
    assert float(gan_discriminator(right, wrong).max()) < 1e-6 < float(gan_discriminator(wrong, right).min())
    assert float(gan_generator(right).max()) < 1e-6 < float(gan_generator(wrong).min())


def test_real_and_generated_samples_may_have_different_places():
    """Images of two sizes: each side's places are averaged by themselves."""
    real, fake = torch.randn(3, 6), torch.randn(3, 2)
    for loss, whole in ((gan_discriminator, softplus), (hinge_discriminator, lambda x: (1 + x).relu())):
        torch.testing.assert_close(loss(real, fake), whole(-real).mean(1) + whole(fake).mean(1))
    torch.testing.assert_close(gan_discriminator(fake, fake), (softplus(fake) + softplus(-fake)).mean(1))


def test_gan_gradients_pull_apart():
    real, fake = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    gan_discriminator(real, fake).sum().backward()
    assert torch.allclose(real.grad, torch.tensor(-0.5)) and torch.allclose(fake.grad, torch.tensor(0.5))
    logits = torch.zeros(2, 1, requires_grad=True)
    gan_generator(logits).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor(-0.5))


def test_every_loss_gives_one_value_per_sample():
    a, b = torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)
    for value in (
        mse(a, b),
        pseudo_huber(a, b, 0.1),
        distribution_matching(a, b, b),
        gan_discriminator(a, b),
    ):
        assert value.shape == (4,)
    assert mse(a, b).tolist() == [1.0] * 4


def test_a_weight_multiplies_the_gradient():
    x0 = torch.randn(4, 2, requires_grad=True)
    real, fake, weight = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0.5, 1.0, 2.0, 4.0])
    plain, weighted = (
        torch.autograd.grad(distribution_matching(x0, real, fake, False, each).sum(), x0)[0]
        for each in (None, weight)
    )
    torch.testing.assert_close(weighted, weight[:, None] * plain)


def test_a_norm_of_nothing_has_a_gradient():
    same = torch.ones(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(vector_huber(same, torch.ones(2, 3), 0.0).sum(), same)
    assert torch.equal(slope, torch.zeros(2, 3))
