"""Losses as pure functions of tensors. Each takes batches (B, ...) and returns one value per sample, (B,).

The trainer averages over samples; a per-sample value is what names the sample that went wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from stepdistill.prediction import Prediction
from stepdistill.schedule import expand


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over everything but the batch."""
    return (prediction - target).square().flatten(1).mean(1)


def denoising(prediction: Prediction, x0: Tensor, eps: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Squared error of a prediction at x_t = alpha x0 + sigma eps, measured in the kind the network predicts.

    For "x0" with EDM's weight 1 / rho^2 + 1 / sigma_data^2 (Karras et al. 2022, Table 1), which makes every
    noise level count alike; the other kinds carry their weight in themselves.
    """
    alpha, sigma = (
        expand(f(prediction.t), x0) for f in (prediction.schedule.alpha, prediction.schedule.sigma)
    )
    targets = {
        "x0": lambda: x0,
        "eps": lambda: eps,
        "v": lambda: alpha * eps - sigma * x0,
        "flow": lambda: eps - x0,
    }
    error = mse(prediction.raw, targets[prediction.kind]())
    if prediction.kind == "x0":
        error = error * (prediction.schedule.rho(prediction.t) ** -2 + sigma_data**-2).to(error)
    return error


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """Elementwise sqrt(d^2 + c^2) - c, averaged (LCM, arXiv 2310.04378); quadratic below c, linear above."""
    return ((prediction - target).square().add(c * c).sqrt() - c).flatten(1).mean(1)


def distribution_matching(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, normalise: bool = True) -> Tensor:
    """The surrogate whose gradient is DMD's (Yin et al. 2023, arXiv 2311.18828, Eqs. 7 and 8).

    Its gradient with respect to `x0` is G / (elements per sample), with G = (fake_x0 - teacher_x0) / w and,
    when `normalise`, w = mean |x0 - teacher_x0| over the sample. Fake minus real in x0-space is the reverse-
    KL descent direction sigma^2 / alpha (s_fake - s_real). Only the direction carries information, so G is a
    constant: the paper stops the gradient at both networks, and so do we.
    """
    with torch.no_grad():
        gradient = fake_x0 - teacher_x0
        if normalise:
            # The floor only matters where student and teacher agree to all digits.
            weight = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp(min=1e-5)
            gradient = gradient / weight.reshape(-1, *[1] * (x0.ndim - 1))
        target = x0 - gradient
    return 0.5 * mse(x0, target)


def gan_generator(fake_logits: Tensor) -> Tensor:
    """Non-saturating: softplus(-D(fake)) (Goodfellow et al. 2014). Logits (B, ...) are averaged per sample."""
    return nnf.softplus(-fake_logits).flatten(1).mean(1)


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)); log 4 when both logits are 0."""
    return (nnf.softplus(fake_logits) + nnf.softplus(-real_logits)).flatten(1).mean(1)
