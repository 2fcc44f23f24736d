"""DD2: Distilled Decoding by conditional scores, without pairs (Liu et al. 2025, arXiv 2510.21003).

Given the codes before a place, the score of the noised code there is a closed form of the teacher's probabilities
(`code_flow.score`). Of what the student says, a second law follows: a copy of the teacher that learns the student's own
codes by cross-entropy. Both are asked about each place behind the student's own codes, which are constants:

    q = G(eps);   z_i = what G says at i, with gradient;   x_s = (1 - s) eps' + s z_i
    grad z_i ~ E_fake[q_i | x_s, q_<i] - E_teacher[q_i | x_s, q_<i]

which is the difference of the two scores, up to a factor of s and 1 - s: distribution matching, place by place, by the
chain rule of the divergence. The published generator and its second network begin as a model with a diffusion head, that
has learnt the teacher's scores; without that they fail. Here both begin as the teacher, whose laws are exact already, and
for `imitation_steps` iterations the student learns where its own noise leads behind its own codes,

    CE(logits_i, flow(eps_i; p(. | q_<i))) + |z_i - q_i|^2,  as in `dd1`,

of which the map of `dd1` is the only fixed point: the first place is right at once, and each other once those before are.

Normal ranges: "agreement", the share of codes that are where the noise leads, rises during the warm-up; "gap", the mean
square distance of the two means, stays below the codes' own variance of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.code_flow import code_mean, lead
from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.errors import UserError
from stepdistill.families.code_denoisers import Coded, CodeLaw
from stepdistill.losses import displaced, moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.methods.dd1 import over
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like


class DD2(Method):
    for_codes = True
    rules: ClassVar[tuple[str, ...]] = ("ode", "renoise")
    carried = ()

    @dataclass
    class Config:
        # Of the teacher, on its logits; 1 = off.
        guidance_scale: float = 1.0
        # Iterations of learning where the noise leads, before scores are compared.
        imitation_steps: int = 1000
        # Where scores are compared: shares of data, uniform between.
        s_low: float = 0.02
        s_high: float = 0.8

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.imitation_steps < 0:
            raise UserError(f"method.imitation_steps must be at least 0, got {config.imitation_steps}.")
        if not 0 <= config.s_low < config.s_high < 1:
            raise UserError(
                "method.s_low and method.s_high must rise between 0 and 1, 1 left out,"
                f" got {config.s_low:g} and {config.s_high:g}."
            )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "ode"}

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        return {"fake_score": CodeLaw(teacher.network)}

    def phases(self, step: int) -> Iterator[Phase]:
        loss = self.imitation if step < self.config.imitation_steps else self.matching
        yield Phase("student", ("student",), ((1.0, loss),))
        # Nobody asks it before; it begins as the teacher, and the student's law is near that by then.
        if step >= 0.8 * self.config.imitation_steps:
            yield Phase("critic", ("fake_score",), ((1.0, self.critic_loss),))

    def generate(self, nets: Networks, batch: Batch) -> tuple[Coded, Tensor, Tensor]:
        """What the student says at one of its passes, the codes of all places (B, L), and their noise (B, L, D)."""
        z, steps = batch.randn(), self.sampling.steps
        grid = self.sampling.grid(nets.schedule, steps[batch.generator.shared_randint(0, len(steps))])
        grid = grid[: 1 + batch.generator.shared_randint(0, len(grid))]
        with torch.no_grad():
            x_t = self.sampling.walk(nets.student, z, grid, lambda _: batch.randn(), batch.cond)
        said = nets.student(x_t, times_like(grid[-1], x_t), batch.cond)
        kept = unwrap(nets.student).network.nearest(x_t)
        # Under "renoise" the noise behind what is kept is another.
        return (
            said,
            torch.where(said.noisy, said.logits.argmax(-1), kept),
            torch.where(said.noisy[..., None], x_t, z),
        )

    @torch.no_grad()
    def teacher_law(self, nets: Networks, batch: Batch, codes: Tensor) -> Tensor:
        """log p(code at i | codes before i), guided, (B, L, K)."""
        network, scale = nets.teacher.network, self.config.guidance_scale
        logits = network.logits(codes, batch.cond)
        if scale != 1:
            logits = network.guide(network.logits(codes, batch.uncond), logits, scale)
        return logits.float().log_softmax(-1)

    def imitation(self, nets: Networks, batch: Batch) -> Losses:
        """Cross-entropy of where each place's noise leads behind the student's own codes."""
        said, codes, z = self.generate(nets, batch)
        law, book = self.teacher_law(nets, batch, codes), nets.teacher.network.book
        right = lead(z.flatten(0, 1), law.flatten(0, 1), book).view_as(codes)
        entropy = F.cross_entropy(said.logits.mT, right, reduction="none")
        squared = (said.vectors - book[right]).square().mean(-1)
        agreement = over(said.noisy, (codes == right).float())
        return {"total": over(said.noisy, entropy + squared), "agreement": agreement} | moments(said.x0)

    def matching(self, nets: Networks, batch: Batch) -> Losses:
        """Distribution matching of each place's law, given the codes before it."""
        said, codes, _ = self.generate(nets, batch)
        config, book = self.config, nets.teacher.network.book
        real = self.teacher_law(nets, batch, codes)
        with torch.no_grad():
            fake = nets.fake_score(codes, batch.cond).float().log_softmax(-1)
            s = config.s_low + (config.s_high - config.s_low) * batch.generator.rand(codes.shape[1]).float()
            s = s.to(book.device).flatten()[:, None]
            x_s = ((1 - s) * batch.randn().flatten(0, 1) + s * said.x0.flatten(0, 1)).float()
            means = [code_mean(x_s, s, law.flatten(0, 1), book).view_as(said.x0) for law in (fake, real)]
        # The straight-through mean of the codes carries the gradient.
        toward = (means[1] - means[0]) * said.noisy[..., None]
        gap = over(said.noisy, toward.square().mean(-1))
        return {"total": displaced(said.x0, toward), "gap": gap} | moments(said.x0)

    def critic_loss(self, nets: Networks, batch: Batch) -> Losses:
        """Cross-entropy of the student's codes, each behind those before it."""
        with torch.no_grad():
            _, codes, _ = self.generate(nets, batch)
        entropy = F.cross_entropy(nets.fake_score(codes, batch.cond).mT, codes, reduction="none").mean(1)
        return {"total": entropy, "entropy": entropy.detach()}
