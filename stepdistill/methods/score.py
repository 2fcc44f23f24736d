"""What the score-distillation methods share: a student, and a fake score that follows what it makes.

The student's own distribution has no known score, so a second denoiser, the fake score, is trained all the
time by plain denoising on what the student makes now (Diff-Instruct, arXiv 2305.18455, Alg. 1; DMD, SiD and
SIM do the same). The frozen teacher stands for the data. A method of this kind differs from the next only in
what it does with the two answers at a diffused sample, which is its `student_loss`.

A student of several steps answers at several places of its sampling, and by the papers one fake score learns the mixture
of all answers. Where that is right, each place may yet be off, if another makes up for it. `tell_place`, which is ours, tells
the fake score at what time an answer was given, so every place is held to the data by itself.

Logged by all, with the names a health panel reads: "gap", the mean square distance of the two answers;
"scores_cosine", the cosine of the two scores, as velocities eps - x0, and "scores_apart", the size of their difference
over the teacher's, by which a critic's health is told; "x0_mean", "x0_std" of the student's samples beside "teacher_x0_mean",
"teacher_x0_std" of the teacher's answers to them; and "denoising", the fake score's loss, which says nothing of its
health. A student that leaves the teacher in mean or std (brightness drift, collapse) has outrun its fake score.

Normal ranges, on data of unit variance, by means over 200 iterations (stepdistill/methods/ranges.py): "gap" below 1, and
falling (on the embedded teacher 0.05 to 0.1 late in runs of Diff-Instruct, DMD2 and f-distill, 0.1 to 0.3 in those of SIM
and SiD, 0.3 to 0.4 where DMD and VSD lag); "scores_cosine" falls from 1 in the first fifty iterations, to 0.7 or more, and
rises slowly from there; "scores_apart" mirrors it, below 1; x0_std between 0.8 and 1.1 of teacher_x0_std.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn, no_grad

from stepdistill import timesteps
from stepdistill.denoiser import Cond, Denoiser, guided, unwrap
from stepdistill.errors import UserError
from stepdistill.lora import NO_LORA, LoraConfig
from stepdistill.losses import denoising, moments, mse
from stepdistill.methods.base import Batch, Losses, LossFn, Method, Networks, Phase
from stepdistill.methods.ranges import SCORES
from stepdistill.prediction import Prediction
from stepdistill.rollout import Simulated, simulate
from stepdistill.sampling import Sampling
from stepdistill.schedule import times_like
from stepdistill.solvers import chord
from stepdistill.timesteps import Density


class Diffused(NamedTuple):
    """Generated samples x0 (B, ...), a constant, the times (B,) and unit noise (B, ...) that diffuse them, which of them
    lost their condition, (B,) bool, and what else the fake score is told of them.
    """

    x0: Tensor
    t: Tensor
    eps: Tensor
    dropped: Tensor
    told: Mapping[str, Tensor] = MappingProxyType({})


class Made(NamedTuple):
    """The student's samples x0 (B, ...), their conditions, and what else the fake score is told of them."""

    x0: Tensor
    cond: Cond
    told: Mapping[str, Tensor] = MappingProxyType({})


class ScoreDistillation(Method):
    """Base of methods with a fake score; `student_loss` is theirs."""

    health: ClassVar[dict[str, tuple[float, float, str]]] = SCORES

    @dataclass
    class Config:
        # Iterations per student update; the critic learns in every one.
        student_every: int = 1
        # Of the teacher; 1 = off.
        guidance_scale: float = 1.0
        # Of the fake score in the student's loss.
        fake_guidance_scale: float = 1.0
        # Adapters over the teacher in place of a copy of it; rank 0 = a copy.
        fake_score_lora: LoraConfig = NO_LORA
        # In a later stage: go on with the fake score of the stage before.
        carry_fake_score: bool = False
        # Of the fake score while it learns: its guided answer is what must denoise (SiD-LSG).
        critic_guidance_scale: float = 1.0
        # Share of samples the fake score learns without their condition.
        critic_dropout: float = 0.0
        # Of the noise levels the two scores are compared at.
        time_density: Density = "uniform"
        # Their range, as fractions of the schedule.
        t_low: float = 0.0
        t_high: float = 1.0
        # The critic's.
        critic_low: float = 0.0
        critic_high: float = 1.0
        # For lognormal; see timesteps.py.
        time_mean: float = timesteps.EDM_MEAN
        time_std: float = 1.2
        critic_density: Literal["same", Density] = "same"
        # Which of its sampling states are met alike; see `simulate`.
        simulated: Simulated = "states"
        # The critic learns on what the student's update was just computed from.
        shared_samples: bool = False
        # Ours: the fake score is told at what time the student answered, so each place must draw all of the data.
        tell_place: bool = False
        # Of the diversity anchor; 0 = off. Published: 0.05 (LightX2V), for students of two steps at least.
        diversity_weight: float = 0.0
        # Steps of the guided teacher it takes, of so many.
        diversity_steps: int = 5
        diversity_grid: int = 30
        # Of the teacher there; 0 = as the method guides it.
        diversity_guidance: float = 0.0

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        if config.student_every < 1:
            raise UserError(f"method.student_every must be at least 1, got {config.student_every}.")
        for low, high in (("t_low", "t_high"), ("critic_low", "critic_high")):
            ends = getattr(config, low), getattr(config, high)
            if not 0 <= ends[0] < ends[1] <= 1:
                raise UserError(
                    f"method.{low} and method.{high} must be fractions of the schedule in rising order,"
                    f" got {ends[0]:g} and {ends[1]:g}."
                )
        if config.tell_place and not self.several:
            raise UserError(
                "method.tell_place=true tells the steps of a student apart, and one of one step has no others; set it to"
                f" false, or give student.steps of 2 or more, got {list(self.sampling.steps)}."
            )
        if config.tell_place and config.fake_score_lora:
            raise UserError(
                "method.tell_place=true makes the fake score another network than the teacher is; set"
                " method.fake_score_lora.rank to 0."
            )
        if config.diversity_weight and min(self.sampling.steps) < 2:
            raise UserError(
                f"method.diversity_weight={config.diversity_weight:g} anchors a student's first step, and one of one step has"
                f" no other; give student.steps of at least 2, got {list(self.sampling.steps)}."
            )
        if not 1 <= config.diversity_steps < config.diversity_grid:
            raise UserError(
                "method.diversity_steps must be at least 1 and below method.diversity_grid,"
                f" got {config.diversity_steps} and {config.diversity_grid}."
            )
        # Of the student's phase, for the critic's after it.
        self._made: deque[tuple[Made, Cond]] = deque()

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return {"rule": "renoise"}

    @property
    def first(self) -> int:
        """The first of the sampling states that score distillation is for; with the anchor, the one after it."""
        return int(self.config.diversity_weight > 0)

    @property
    def several(self) -> bool:
        """Whether the student learns at several places of its sampling."""
        return max(self.sampling.steps) > 1

    @property
    def carried(self) -> tuple[str, ...]:
        return ("fake_score",) if self.config.carry_fake_score else ()

    @property
    def critics(self) -> tuple[str, ...]:
        """What the critic's phase trains."""
        return ("fake_score",)

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        lora = self.config.fake_score_lora
        fake_score = lora.over(teacher.backbone()) if lora else teacher.clone()
        if self.config.tell_place:
            network = fake_score.network
            if "end" not in getattr(network, "extras", {}):
                raise UserError(
                    "method.tell_place=true: this family's networks can be told no second time; set it to false."
                )
            network.extras["end"]()
        return {"fake_score": fake_score}

    def phases(self, step: int) -> Iterator[Phase]:
        if step % self.config.student_every == 0:
            terms: tuple[tuple[float, LossFn], ...] = ((1.0, self.student_loss),)
            if self.config.diversity_weight:
                terms += ((self.config.diversity_weight, self.diversity_loss),)
            yield Phase("student", ("student",), terms)
        yield Phase("critic", self.critics, ((1.0, self.critic_loss),))

    def student_loss(self, nets: Networks, batch: Batch) -> Losses:
        raise NotImplementedError

    def anchor(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """A state x_t (B, ...) of the student's own sampling and its time (B,), one for the whole global batch."""
        return simulate(self.sampling, nets, batch, by=self.config.simulated, first=self.first)[:2]

    def told(self, t: Tensor) -> dict[str, Tensor]:
        """What the fake score is told of answers at the student's time t (B,)."""
        # By the input that tells a flow map where its jump ends.
        return {"end": t} if self.config.tell_place else {}

    def generate(self, nets: Networks, batch: Batch) -> Made:
        """x0 = G(x_K, t_K) at one of the student's own sampling steps; with gradient through the last
        call only.
        """
        x_t, t = self.anchor(nets, batch)
        return self.kept(batch, Made(nets.student(x_t, t, batch.cond).x0, batch.cond, self.told(t)))

    def kept(self, batch: Batch, made: Made) -> Made:
        """The same, which the critic learns on as well where samples are shared."""
        if self.config.shared_samples and made.x0.requires_grad:
            self._made.append((made._replace(x0=made.x0.detach()), batch.uncond))
        return made

    def guidance(self, batch: Batch) -> float:
        """The scale of the guided teacher that the student as a whole goes towards."""
        return self.config.guidance_scale

    def diversity_loss(self, nets: Networks, batch: Batch) -> Losses:
        """The student's first answer held to the guided teacher's own way from the same noise.

        Matching distributions forgives a student that draws one layout for all noise. So its first step is regressed on
        the line from its noise to where `diversity_steps` of the teacher's lead, at noise a: in flow (eps - x_a) / (1 - a),
        in x0-space the x0 whose one DDIM step ends there. The scores then act on the later steps alone.
        """
        schedule, config = nets.schedule, self.config
        first = self.sampling.grid(schedule, min(self.sampling.steps))[0]
        x_first = self.sampling.first_input(schedule, batch.randn(), first)
        later = [t for t in schedule.teacher_grid(config.diversity_grid) if t < first][
            : config.diversity_steps
        ]
        scale = config.diversity_guidance or self.guidance(batch)
        with torch.no_grad():
            x = x_first
            for t, s in itertools.pairwise([first, *later]):
                said = guided(nets.teacher, x, times_like(t, x), batch.cond, batch.uncond, scale)
                x = said.at(times_like(s, x)).to(x.dtype)
            ends = times_like(first, x), times_like(later[-1], x)
            target = chord(schedule, x_first, x, *ends).to(x.dtype)
        loss = mse(nets.student(x_first, ends[0], batch.cond).x0, target)
        return {"total": loss, "anchor": loss}

    def times(
        self, nets: Networks, batch: Batch, low: float = 0.0, high: float = 1.0, density: str = "same"
    ) -> Tensor:
        config = self.config
        density = config.time_density if density == "same" else density
        mean, std = config.time_mean, config.time_std
        return timesteps.draw(density, nets.schedule, batch.generator, low, high, mean, std, nets.sigma_data)

    def critic_times(self, nets: Networks, batch: Batch) -> Tensor:
        config = self.config
        return self.times(nets, batch, config.critic_low, config.critic_high, config.critic_density)

    def diffuse(self, nets: Networks, batch: Batch, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x0 at a drawn time: x_t (B, ...), which carries x0's gradient, and t (B,)."""
        t = self.times(nets, batch, self.config.t_low, self.config.t_high)
        return nets.schedule.add_noise(x0, batch.randn(), t), t

    def teacher_at(self, nets: Networks, batch: Batch, x_t: Tensor, t: Tensor) -> Prediction:
        return guided(nets.teacher, x_t, t, batch.cond, batch.uncond, self.config.guidance_scale)

    def fake_at(self, nets: Networks, batch: Batch, x_t: Tensor, t: Tensor, **told: Tensor) -> Prediction:
        scale = self.config.fake_guidance_scale
        return guided(nets.fake_score, x_t, t, batch.cond, batch.uncond, scale, **told)

    def ask(self, nets: Networks, batch: Batch, x0: Tensor, **told: Tensor) -> tuple[Prediction, Prediction]:
        """What teacher and fake score say of x0 diffused to a drawn time; told: to the fake score alone.

        Their inputs carry x0's gradient: methods that want none call this under no_grad.
        """
        x_t, t = self.diffuse(nets, batch, x0)
        return self.teacher_at(nets, batch, x_t, t), self.fake_at(nets, batch, x_t, t, **told)

    def critic_loss(self, nets: Networks, batch: Batch) -> Losses:
        """Denoising of what the student makes now."""
        return self.denoise(nets, batch)[0]

    def denoise(self, nets: Networks, batch: Batch) -> tuple[Losses, Diffused]:
        """The critic's denoising loss and what it was taken on."""
        # One forward pass of the student less.
        if self._made:
            # Of the student's phase, whose captions and, with several image sizes, shape were others.
            (x0, cond, told), uncond = self._made.popleft()
            batch = replace(batch, cond=cond, uncond=uncond, shape=tuple(x0.shape[1:]))
        else:
            with no_grad():
                x0, _, told = self.generate(nets, batch)
        config = self.config
        t, eps = self.critic_times(nets, batch), batch.randn()
        # Of a condition that was dropped the guided answer is the unconditional one.
        (cond, dropped), scale = batch.dropped(config.critic_dropout), config.critic_guidance_scale
        x_t = nets.schedule.add_noise(x0, eps, t)
        prediction = guided(nets.fake_score, x_t, t, cond, batch.uncond, scale, **told)
        loss = self.critic_error(prediction, x0, eps, unwrap(nets.fake_score).sigma_data)
        return {"total": loss, "denoising": loss}, Diffused(x0, t, eps, dropped, told)

    def critic_error(self, prediction: Prediction, x0: Tensor, eps: Tensor, sigma_data: float) -> Tensor:
        """Per sample, (B,); the network's own kind of error unless a paper has another."""
        return denoising(prediction, x0, eps, sigma_data)


class ScoreImplicit(ScoreDistillation):
    """Base of SIM and SiD, whose gradient runs through the inputs of both scores: SiD's settings on EDM's
    schedule (Zhou et al. 2024, arXiv 2404.04057), which SIM follows.
    """

    @dataclass
    class Config(ScoreDistillation.Config):
        # Of the student; the fake score has EDM's lognormal.
        time_density: Density = "karras"
        t_high: float = 0.8
        critic_density: Literal["same", Density] = "lognormal"

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        return super().sampled(config) | {"first_rho": 2.5, "init_noise": "sigma"}


def compared(x0: Tensor, real: Prediction, fake: Prediction) -> Losses:
    """What is logged of a comparison: the two answers' mean square distance, how far the scores are apart, the student's
    samples beside the teacher's answers.
    """
    teacher = {f"teacher_{name}": value for name, value in moments(real.x0).items()}
    # The scores themselves, at unit noise: their cosine, and the size of their difference beside the teacher's.
    theirs, own = (each.flow.detach().flatten(1) for each in (real, fake))
    scores = {
        "scores_cosine": torch.cosine_similarity(theirs, own),
        "scores_apart": (theirs - own).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-12),
    }
    return {"gap": mse(fake.x0, real.x0).detach()} | scores | moments(x0) | teacher
