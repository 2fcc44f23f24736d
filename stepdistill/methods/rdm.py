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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.config import build
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.eyes import EYES, Eye
from stepdistill.losses import moments
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, addressed
from stepdistill.registry import made, resolve
from stepdistill.representation import Moments, frechet, mmd
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like


@dataclass(frozen=True)
class Encoder:
    """One frozen network: a name in eyes.EYES, or with --allow-code my_module:MyEye, its arguments and its weight."""

    name: str = "clip"
    arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, got {self.weight:g}.")


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
        if not config.encoders:
            raise UserError("method.encoders is empty; give at least one, {name: clip} say.")
        self.encoders = [
            build(Encoder, each, f"method.encoders.{i}") for i, each in enumerate(config.encoders)
        ]
        self._classes = [
            resolve(each.name, EYES, "eye", where=f"method.encoders.{i}.name")
            for i, each in enumerate(self.encoders)
        ]
        self._eyes: list[Eye] = []
        # Of the iteration's passes, by encoder, for the running moments.
        self._seen: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def eyes(self) -> list[Eye]:
        """Made when they are first asked for."""
        if not self._eyes:
            eyes = []
            for i, (found, each) in enumerate(zip(self._classes, self.encoders, strict=True)):
                with addressed(f"method.encoders.{i}"):
                    eyes.append(made(found, each.arguments, each.name))
            if self.config.prompt_weight and not any(eye.prompt_width for eye in eyes):
                raise UserError(
                    f"method.prompt_weight={self.config.prompt_weight:g}: none of method.encoders embeds prompts; set it to 0,"
                    " or add {name: clip}."
                )
            self._eyes = eyes
        return self._eyes

    @property
    def trained_on(self) -> tuple[str, ...]:
        return tuple(eye.directory for eye in self.eyes if eye.directory)

    @property
    def needs_captions(self) -> bool:
        return self.config.prompt_weight > 0 and any(each.reads_captions for each in self._classes)

    def networks(self, teacher: Denoiser | None, student: Denoiser) -> dict[str, nn.Module]:
        if self.config.distance == "mmd":
            return {}
        told = self.config.prompt_weight > 0
        widths = [sum(eye.widths) + told * eye.prompt_width for eye in self.eyes]
        return {"moments": Moments(widths)}

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
            real = self.features(nets.decode(batch.x0), batch)
        drawn = [self.chunk(nets, batch) for _ in range(self.config.chunks)]
        x0 = torch.cat([each[0] for each in drawn]).detach()
        total, losses, seen = x0.new_zeros(()), {}, []
        for i, each in enumerate(self.encoders):
            ours = torch.cat([features[i] for _, features in drawn])
            if self.config.distance == "fd":
                distance = frechet(*nets.moments.blended(i, ours, real[i], self.config.memory))
            else:
                distance = mmd(ours, real[i])
            seen.append((ours.detach(), real[i]))
            losses[f"distance_{i}"] = distance.detach().float()
            total = total + each.weight * distance.float()
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
            return x0, *self.features(nets.decode(x0), batch)

        x0, *features = checkpoint(seen, x, use_reentrant=False)
        return x0, features

    def features(self, images: Tensor, batch: Batch) -> list[Tensor]:
        """By encoder, (B, width): means over places of each of its layers, in a row, and the captions'."""
        found = []
        for eye in self.eyes:
            parts = [layer.float().mean(1) for layer in eye.features(images)]
            if self.config.prompt_weight and eye.prompt_width:
                told = eye.prompts(_texts(batch.prompts), images.device)
                parts.append(self.config.prompt_weight * told.to(parts[0]))
            found.append(torch.cat(parts, 1))
        return found


def _texts(prompts: Sequence[Any] | None) -> Sequence[Any]:
    if prompts is None:
        raise UserError("method.prompt_weight needs captions, and this data has none; set it to 0.")
    return prompts
