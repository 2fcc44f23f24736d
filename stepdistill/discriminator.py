"""Small discriminator heads over tapped activations (DMD2, LADD, ADD, Lightning), and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser
from stepdistill.losses import GAN_LOSSES, approximate_r1, r1


class Head(nn.Module):
    """One tapped block -> logits. (B, C, H, W) maps, (B, N, C) tokens or (B, C) vectors.

    One logit per place (LADD); a vector has one place. condition: width of what else the head is told, which
    enters by projection (Miyato & Koyama 2018): its product with the hidden state is added to the logit.
    kernel: side of a residual convolution over neighbouring places, as StyleGAN-T's heads have; 1 = none, so
    that each place is judged alone. Tokens lie in one row, so it is a one-dimensional one there.
    """

    def __init__(self, channels: int, width: int = 128, condition: int = 0, kernel: int = 1):
        super().__init__()
        groups = next(g for g in (16, 8, 4, 2, 1) if width % g == 0)
        self.enter, self.norm = nn.Linear(channels, width), nn.GroupNorm(groups, width)
        self.leave = nn.Linear(width, 1)
        self.project = nn.Linear(condition, width, bias=False) if condition else None
        self.mix = None
        if kernel > 1:
            convolution = nn.Conv2d(width, width, kernel, padding=kernel // 2)
            self.mix = nn.Sequential(convolution, nn.GroupNorm(groups, width), nn.SiLU())

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        """condition: (B, width) -> logits (B, places)."""
        shape = features.shape[2:] if features.ndim == 4 else (1, -1)
        if features.ndim == 4:
            places = features.flatten(2).transpose(1, 2)
        else:
            places = features if features.ndim == 3 else features[:, None]
        hidden = nnf.silu(self.norm(self.enter(places).transpose(1, 2)))
        if self.mix is not None:
            # Halved in variance, so that the sum is of the size of its parts.
            hidden = (hidden + self.mix(hidden.unflatten(2, shape)).flatten(2)) * 2**-0.5
        hidden = hidden.transpose(1, 2)
        logits = self.leave(hidden)[..., 0]
        if self.project is not None:
            logits = logits + (hidden * self.project(condition)[:, None]).sum(-1) / hidden.shape[-1] ** 0.5
        return logits


# Of one head, (B, places), or of several, a list of them: heads may have different numbers of places.
Logits = Tensor | Sequence[Tensor]


def heads_of(logits: Logits) -> Sequence[Tensor]:
    return [logits] if isinstance(logits, Tensor) else logits


def over_heads(
    function: Callable[..., Tensor], *logits: Logits, how: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """`function` of each head's logits, real beside fake, then their mean or sum over heads, (B,).

    Places are averaged within a head, so that a block with many of them does not outweigh the others.
    """
    each = torch.stack([function(*one) for one in zip(*map(heads_of, logits), strict=True)])
    return each.mean(0) if how == "mean" else each.sum(0)


def logit(logits: Logits) -> Tensor:
    """One number per sample, (B,): the mean over heads of the mean over places."""
    return over_heads(lambda one: one.flatten(1).mean(1), logits)


class Discriminator(nn.Module):
    """A head per tapped block; the logits of each, (B, its places).

    channels: the channel count of each tap, in the order the features come. The rest: see `Head`.
    """

    def __init__(self, channels: Sequence[int], width: int = 128, condition: int = 0, kernel: int = 1):
        super().__init__()
        self.heads = nn.ModuleList(Head(count, width, condition, kernel) for count in channels)

    def forward(self, features: Sequence[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        pairs = zip(self.heads, features, strict=True)
        return [head(feature, condition) for head, feature in pairs]


Blocks = Literal["all", "half", "middle"]


def chosen_blocks(denoiser: Denoiser, which: Blocks) -> dict[str, int]:
    """Name -> channels of the blocks to tap: all, those up to the middle one (half of the cost), or that one."""
    names = list(denoiser.blocks)
    last = names.index(denoiser.middle)
    kept = {"all": names, "half": names[: last + 1], "middle": names[last : last + 1]}[which]
    return {name: denoiser.blocks[name] for name in kept}


@dataclass
class Adversarial:
    """The part of a method's Config that says which game is played; `discriminator_losses` plays it."""

    gan: Literal["hinge", "non_saturating", "relativistic"] = "hinge"
    # Of |grad D|^2 at real inputs (half of the usual gamma); 0 = off.
    r1_weight: float = 0.0
    # By a second derivative, or by a finite difference (APT's aR1).
    r1: Literal["exact", "finite"] = "finite"
    # Standard deviation of the finite difference's nudge.
    r1_delta: float = 0.01
    # The same at generated inputs; the relativistic game needs it.
    r2: bool = False
    # Side of a residual convolution in each head, over neighbouring places; 1 = none.
    head_kernel: int = 1
    # How the losses of several heads come together.
    heads: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.head_kernel < 1 or self.head_kernel % 2 == 0:
            raise ValueError(f"head_kernel must be odd and at least 1, got {self.head_kernel}.")


# Of a method with a phase "discriminator" (`Method.health`). A student that keeps up is told at chance, 0.5.
ACCURACY = {
    "discriminator/accuracy": (
        0.2,
        0.98,
        "above, the discriminator wins outright: raise method.r1_weight or lower optim.discriminator.lr; below, it"
        " learns nothing",
    ),
}

Critic = Callable[[Tensor], Logits]


def generator_loss(config: Adversarial, fake: Logits, real: Logits | None = None) -> Tensor:
    """The student's side of the game, (B,); only the relativistic one looks at real logits."""
    play = GAN_LOSSES[config.gan][1]
    return over_heads(play, fake, *(() if real is None else (real,)), how=config.heads)


def discriminator_losses(
    config: Adversarial,
    real: tuple[Critic, Tensor],
    fake: tuple[Critic, Tensor],
    randn: Callable[[], Tensor],
    misaligned: tuple[Critic, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One discriminator step: the game's loss, the gradient penalties, and what tells how it goes.

    Args:
        real, fake: (critic, x_t) each: logits (B, ...), one such tensor or one per head, = critic(x_t), with
            time, condition and whatever else bound. The penalties are taken at these very inputs, of D the mean or
            sum over heads, as the game's losses are.
        randn: fresh unit noise in the shape of x_t, for the finite difference.
        misaligned: fakes of a second kind, as (critic, x_t). The game is played against them once more with the
            same real inputs, lest fakes of two kinds outweigh those.

    Returns:
        total, gan, accuracy (share of inputs told right), real_logit, fake_logit and, where they are on, r1,
        r2 and misaligned.
    """
    penalised = {"r1": config.r1_weight > 0, "r2": config.r1_weight > 0 and config.r2}
    logits, penalties = [], {}
    for (name, wanted), (critic, x_t) in zip(penalised.items(), (real, fake), strict=True):
        x_t = x_t.detach().requires_grad_(wanted and config.r1 == "exact")
        logits.append(critic(x_t))
        if wanted:
            seen = _whole(config, logits[-1])
            penalties[name] = (
                r1(seen, x_t)
                if config.r1 == "exact"
                else approximate_r1(
                    seen, _whole(config, critic(x_t + config.r1_delta * randn())), config.r1_delta
                )
            )
    play = GAN_LOSSES[config.gan][0]
    gan = over_heads(play, *logits, how=config.heads)
    again = {}
    if misaligned is not None:
        critic, x_t = misaligned
        again = {"misaligned": over_heads(play, logits[0], critic(x_t), how=config.heads)}
    means = [logit(each).detach() for each in logits]
    right = means[0] > means[1] if config.gan == "relativistic" else torch.cat((means[0] > 0, means[1] < 0))
    return {
        "total": gan + config.r1_weight * sum(penalties.values()) + sum(again.values()),
        "gan": gan,
        "accuracy": right.float().mean(),
        "real_logit": means[0],
        "fake_logit": means[1],
        **penalties,
        **again,
    }


def _whole(config: Adversarial, logits: Logits) -> Tensor:
    """D as the penalties see it, (B, 1)."""
    return over_heads(lambda one: one.flatten(1).mean(1), logits, how=config.heads)[:, None]
