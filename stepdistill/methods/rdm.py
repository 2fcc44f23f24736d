"""RDM: distribution matching in frozen representations, with no teacher and no critic (arXiv 2604.28190, 2607.02375).

Frozen networks see images; what a one-step student draws must have the distribution of features that real images have:

    fd     |m - m_r|^2 + tr S + tr S_r - 2 tr (S_r^1/2 S S_r^1/2)^1/2,  moments of N samples and of the past    (FD-loss)
    mmd    mean k(g, g') - 2 mean k(g, r) + mean k(r, r'),  k Gaussian, its width the median distance of reals  (iRDM)

A statistic is of all N = chunks x batch samples at once, and no mean of those of parts: splitting a batch for memory would
change what is minimised. So each chunk is drawn twice, once for its features, once when its gradient is due (gradient
caching), and only one chunk's activations are alive. In several processes, and in each pass of an accumulated batch, the N
are its own. `prompt_weight` puts the caption's embedding beside the features: then prompts are matched, not images alone.

`fd` keeps running moments of both sides, constants but for this batch's share 1 - `memory`: features outnumber a batch. It
needs some hundred updates before they say something, in which the rate should be low (`optim.warmup_steps`).

Left out of FD-loss: its start from moments of 50,000 samples, and real moments that stand still. Left out of iRDM: landmarks
in place of the reals, and weights of encoders by what real samples leave of each; here `weight` says them.

An encoder that is trained on says nothing as a judge any more: `run.metric` by the same network is refused. Begin from a
student that another method left (`student.init`).

Normal ranges: "distance" falls, and for mmd passes below 0 where student and data agree; x0_std near teacher_x0_std, the data's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.frozen import Encoders
from stepdistill.losses import moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.representation import Moments, frechet, mmd
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like


class RDM(Method):
    needs_teacher = False
    needs_images = True
    needs_decoder = True

    @dataclass
    class Config:
        distance: Literal["fd", "mmd"] = "mmd"
        # Each a section of name, arguments and weight.
        encoders: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "clip"}])
        # N over the batch.
        chunks: int = 4
        # beta, of fd's running moments.
        memory: float = 0.99
        # Of the caption's embedding beside the features; 0 = images alone.
        prompt_weight: float = 0.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if self.sampling.steps != (1,):
            raise UserError(
                f"rdm trains students of one step; set student.steps to [1], not {list(self.sampling.steps)}."
            )
        if config.chunks < 1 or not 0 <= config.memory < 1:
            raise UserError(
                "method.chunks must be at least 1, and method.memory at least 0 and below 1,"
                f" got {config.chunks} and {config.memory:g}."
            )
        self.encoders = Encoders(config.encoders, config.prompt_weight)
        # Of the iteration's passes, by encoder, for the running moments.
        self._seen: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def trained_on(self) -> tuple[str, ...]:
        return self.encoders.directories

    @property
    def needs_captions(self) -> bool:
        return self.encoders.reads_captions

    def networks(self, teacher: Denoiser | None, student: Denoiser) -> dict[str, nn.Module]:
        return {"moments": Moments(self.encoders.widths)} if self.config.distance == "fd" else {}

    def phases(self, step: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), ((1.0, self.loss),))

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        if self._seen and self.config.distance == "fd":
            whole = [
                tuple(torch.cat(each) for each in zip(*passes, strict=True))
                for passes in zip(*self._seen, strict=True)
            ]
            nets.moments.update(whole, self.config.memory)
        self._seen = []

    def averaged(self, nets: Networks, average: Callable[[Tensor], Tensor]) -> None:
        if self.config.distance == "fd":
            for kept in nets.moments.buffers():
                kept.copy_(average(kept))

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        # The kernel's width is of real samples' distances; `chunks` makes more of generated ones alone.
        if self.config.distance == "mmd" and len(batch.index) < 2:
            raise UserError(
                "method.distance=mmd compares the real samples of a pass with one another, and this pass has one; set"
                " optim.micro_batch_size to at least 2, or method.distance to fd."
            )
        with torch.no_grad():
            real = self.encoders.features(nets.decode(batch.x0), batch.prompts)
        drawn = [self.chunk(nets, batch) for _ in range(self.config.chunks)]
        x0 = torch.cat([each[0] for each in drawn]).detach()
        total, losses, seen = x0.new_zeros(()), {}, []
        for i, weight in enumerate(self.encoders.weights):
            ours = torch.cat([features[i] for _, features in drawn])
            if self.config.distance == "fd":
                distance = frechet(*nets.moments.blended(i, ours, real[i], self.config.memory))
            else:
                distance = mmd(ours, real[i])
            seen.append((ours.detach(), real[i]))
            losses[f"distance_{i}"] = distance.detach().float()
            total = total + weight * distance.float()
        self._seen.append(seen)
        count = len(batch.index)
        # One number of the whole batch, which the trainer averages over samples.
        losses |= {"total": total.expand(count), "distance": total.detach()}
        return losses | moments(x0) | moments(batch.x0, "teacher_")

    def chunk(self, nets: Networks, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Samples under the batch's conditions and each encoder's features of them; activations are made anew in backward."""
        first = self.sampling.grid(nets.schedule, 1)[0]
        x = self.sampling.first_input(nets.schedule, batch.randn(), first)

        def seen(x: Tensor) -> tuple[Tensor, ...]:
            x0 = nets.student(x, times_like(first, x), batch.cond).x0
            return x0, *self.encoders.features(nets.decode(x0), batch.prompts)

        x0, *features = checkpoint(seen, x, use_reentrant=False)
        return x0, features
