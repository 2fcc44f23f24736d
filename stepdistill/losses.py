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


def moments(x0: Tensor, whose: str = "") -> dict[str, Tensor]:
    """Mean and standard deviation of all of `x0`: what brightness drift and collapse show in first.

    whose: goes before the names, such as "teacher_".
    """
    x0 = x0.detach()
    return {f"{whose}x0_mean": x0.mean(), f"{whose}x0_std": x0.std()}


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


def distribution_matching(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    normalise: bool = True,
    weight: Tensor | None = None,
    answer: Tensor | None = None,
) -> Tensor:
    """The surrogate whose gradient is DMD's (Yin et al. 2023, arXiv 2311.18828, Eqs. 7 and 8).

    Its gradient with respect to `x0` is G / (elements per sample), with G = (fake_x0 - teacher_x0) / w and,
    when `normalise`, w = mean |x0 - teacher_x0| over the sample. Fake minus real in x0-space is the reverse-
    KL descent direction sigma^2 / alpha (s_fake - s_real). Only the direction carries information, so G is a
    constant: the paper stops the gradient at both networks, and so do we. weight: (B,), multiplies G.
    answer: stands for x0 in w, where what is matched is no clean sample.
    """
    with torch.no_grad():
        gradient = fake_x0 - teacher_x0
        if weight is not None:
            gradient = gradient * expand(weight, x0)
        if normalise:
            # The floor only matters where student and teacher agree to all digits.
            scale = ((x0 if answer is None else answer) - teacher_x0).abs().flatten(1).mean(1).clamp(min=1e-5)
            gradient = gradient / expand(scale, x0)
    return displaced(x0, -gradient)


def displaced(x0: Tensor, direction: Tensor, scale: Tensor | None = None) -> Tensor:
    """|x0 - sg(x0 + direction / scale)|^2 / 2, means over the sample's elements: the surrogate whose gradient is
    -direction / scale over their number. scale: (B,), None = 1.
    """
    if scale is not None:
        direction = direction / expand(scale, x0)
    return 0.5 * mse(x0, (x0 + direction).detach())


def score_implicit(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, huber_c: float) -> Tensor:
    """The surrogate whose gradient is that of E d(s_fake - s_real), sampling law held (SIM, arXiv 2410.16794,
    Theorem 3.1), read in x0-space: with D = teacher_x0 - fake_x0 and means over the sample's elements,

        <D, fake_x0 - x0> / sqrt(<D, D> + huber_c^2)          pseudo-Huber, huber_c > 0
        <D, fake_x0 - x0>                                     L2, huber_c = 0

    The gradient must reach x0 through all three: the answers at x_t depend on x0 by the networks' inputs. At
    the optimal fake score its expectation is 0 whatever the student, so its value says nothing of progress.
    """
    gap = (teacher_x0 - fake_x0).flatten(1)
    product = (gap * (fake_x0 - x0).flatten(1)).mean(1)
    return product / (gap.square().mean(1) + huber_c**2).sqrt() if huber_c else product


def score_identity(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    alpha: float,
    normalise: bool = True,
    weight: Tensor | float = 1.0,
    slope: Tensor | float = 0.0,
) -> Tensor:
    """SiD's loss (Zhou et al. 2024, arXiv 2404.04057, Sec. 4), means over the sample's elements:

        <D, (teacher_x0 - x0) - alpha D> / w,    D = teacher_x0 - fake_x0,

    and, when `normalise`, w = mean |x0 - teacher_x0|, a constant. The gradient must reach x0 through both
    networks' inputs, as in `score_implicit`, which is alpha = 1. At the optimal fake score its expectation
    is (1 - alpha) E <D, D>: negative for the paper's 1.2.

    weight, slope: (B,) h and r h' of Uni-Instruct (`sida`): weight times the above, less slope <D, D> / 2 (before w).
    """
    gap = (teacher_x0 - fake_x0).flatten(1)
    loss = weight * (gap * ((teacher_x0 - x0).flatten(1) - alpha * gap)).mean(1)
    if isinstance(slope, Tensor):
        loss = loss - slope * gap.square().mean(1) / 2
    if normalise:
        loss = loss / (x0 - teacher_x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return loss


def gan_generator(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Non-saturating: softplus(-D(fake)) (Goodfellow et al. 2014). Logits (B, ...) of one head are averaged per
    sample; `discriminator.over_heads` brings several together.
    """
    return nnf.softplus(-fake_logits).flatten(1).mean(1)


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)); log 4 when both logits are 0. The two may have different places."""
    return sum(nnf.softplus(each).flatten(1).mean(1) for each in (fake_logits, -real_logits))


def hinge_generator(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-D(fake) (Lim & Ye 2017)."""
    return -fake_logits.flatten(1).mean(1)


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """relu(1 - D(real)) + relu(1 + D(fake)); flat where both are beyond the margin. Places as above."""
    return sum(nnf.relu(1 + each).flatten(1).mean(1) for each in (fake_logits, -real_logits))


def relativistic_generator(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """softplus(D(real) - D(fake)), each fake beside a real (Huang et al. 2024, arXiv 2501.05441, Eq. 2)."""
    return nnf.softplus(real_logits - fake_logits).flatten(1).mean(1)


def relativistic_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake) - D(real)): what counts is which of the two looks more real."""
    return nnf.softplus(fake_logits - real_logits).flatten(1).mean(1)


# By name: the discriminator's loss (real, fake) and the generator's (fake, real); only the relativistic
# generator looks at real logits.
GAN_LOSSES = {
    "hinge": (hinge_discriminator, hinge_generator),
    "non_saturating": (gan_discriminator, gan_generator),
    "relativistic": (relativistic_discriminator, relativistic_generator),
}


def r1(logits: Tensor, x_t: Tensor) -> Tensor:
    """|grad_x D(x_t)|^2 per sample (Mescheder et al. 2018), D the mean of a sample's logits.

    `logits` must come from `x_t` with its gradient on; the graph is kept for the second derivative. A
    gradient that never reaches x_t (heads alone) is an error, not a zero.
    """
    (slope,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), x_t, create_graph=True)
    return slope.square().flatten(1).sum(1)


def approximate_r1(logits: Tensor, nudged_logits: Tensor, delta: float) -> Tensor:
    """((D(x_t) - D(x_t + delta n)) / delta)^2, n ~ N(0, I): `r1` in expectation as delta goes to 0, without
    its second derivative (APT, arXiv 2501.08316, Sec. 3.4).

    Both logits are of the *same noised input*, at the same time: what is nudged is what the discriminator
    sees. The paper's weight lambda on the plain square is lambda delta^2 here.
    """
    return ((logits - nudged_logits).flatten(1).mean(1) / delta).square()


def vector_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|d|^2 + c^2) - c with the norm over the whole sample; c = 0 is the norm itself, with a gradient of
    0 where it is 0.
    """
    return ((prediction - target).square().flatten(1).sum(1) + c * c + 1e-16).sqrt() - c
