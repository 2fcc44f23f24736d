"""DisBack: distribution backtracking around any score distillation (Zhang et al. 2024, arXiv 2408.15991).

At the start of a distillation the teacher's score is trustworthy where data are, and the student's samples are
somewhere else. DisBack first walks from the teacher to the student, and leads the student back along that way:

    degradation    G0, the student as it starts, stays frozen; s' starts as the teacher and learns by denoising the
                   score of what G0 makes. On the way it is recorded:  s'_0 = teacher, s'_1, ..., s'_N   (Sec. 4.1)
    backtracking   the base method runs with s'_(N-1), ..., s'_1, s'_0 in turn as its teacher, `interval` iterations
                   each and the last to the end; its fake score starts as s'_N                         (Sec. 4.2)

Written as two `stages:` with the same `path` (N) and `base`, the base method's own section; the second takes
over what the first recorded, key by key. The recorded networks have never seen guidance, so whatever guides in
the base (its scales, the augmentation of decoupled_dmd) holds for the last target alone. The first stage learns
at the base's own noise levels; the record is even in iterations.

Normal ranges: the first stage's "denoising" falls, by a quarter on the embedded teacher, and levels off, which
shows that the walk has arrived; the second's are the base's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill import config as configuration
from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.errors import UserError
from stepdistill.lora import LoRA
from stepdistill.methods.base import Batch, Losses, LossFn, Method, Networks, PairSettings, Phase, addressed
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.methods.score import ScoreDistillation
from stepdistill.registry import resolve
from stepdistill.sampling import RULES, Sampling
from stepdistill.schedule import Schedule

# Of targets that have never seen guidance, in bases that have these settings. The diversity anchor stays, and takes the
# target's own plain trajectory: without it the scores would act on a step that the fake score was never shown.
UNGUIDED = {
    "guidance_scale": 1.0,
    "fake_guidance_scale": 1.0,
    "critic_guidance_scale": 1.0,
    "diversity_guidance": 1.0,
    "augmentation": 0.0,
}


class DisBack(Method):
    @dataclass
    class Config:
        stage: Literal["degrade", "backtrack"] = "backtrack"
        # N, recorded networks, of which the last starts the fake score.
        path: int = 4
        # Iterations between two records, and with each target.
        interval: int = 1000
        # A method with a fake score.
        base: dict[str, Any] = field(default_factory=lambda: {"name": "dmd2"})

    rules = RULES

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        for name in ("path", "interval"):
            if getattr(config, name) < 1:
                raise UserError(f"method.{name} must be at least 1, got {getattr(config, name)}.")
        cls, own = _base(config)
        with addressed("method.base"):
            self.base: ScoreDistillation = cls(own, self.sampling)
        self.on_the_way = cls(_unguided(own), self.sampling)
        # In the other stage no student learns.
        if config.stage == "backtrack":
            self.health = self.base.health

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        """As the base method says."""
        base, own = _base(config)
        return base.sampled(own)

    @property
    def _records(self) -> tuple[str, ...]:
        """s'_1 .. s'_(N-1); s'_0 is the teacher, s'_N the fake score."""
        return tuple(f"path_{i}" for i in range(1, self.config.path))

    @property
    def carried(self) -> tuple[str, ...]:
        return ("fake_score", *self._records) if self.config.stage == "backtrack" else ()

    @property
    def needs_images(self) -> bool:
        return self.config.stage == "backtrack" and self.base.needs_images

    def pairs(self, schedule: Schedule) -> PairSettings | None:
        with addressed("method.base"):
            return self.base.pairs(schedule) if self.config.stage == "backtrack" else None

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        made = self.base.networks(teacher, student)
        # In both stages, or the second would refuse what the first has learnt.
        if not isinstance(made.get("fake_score"), Denoiser) or isinstance(made["fake_score"], LoRA):
            raise UserError(
                f"method.base={self.config.base.get('name')}: its fake score must be a whole network, which can stand in the"
                " teacher's place, as those of dmd2 and sid are without a fake_score_lora."
            )
        if self.config.stage == "degrade":
            made = {"fake_score": made["fake_score"]}
        return made | {name: teacher.clone() for name in self._records}

    def phases(self, step: int) -> Iterator[Phase]:
        if self.config.stage == "degrade":
            yield Phase("record", ("fake_score",), ((1.0, self.record),))
            return
        target, method = self._asked(step)
        for phase in method.phases(step):
            terms = tuple((weight, _towards(loss, target)) for weight, loss in phase.terms)
            yield Phase(phase.name, phase.trains, terms)

    def _asked(self, step: int) -> tuple[int, ScoreDistillation]:
        """Index of s' on the path, 0 = the teacher, and the method whose teacher it is."""
        target = max(self.config.path - 1 - step // self.config.interval, 0)
        method = self.on_the_way if target else self.base
        return target, method

    def record(self, nets: Networks, batch: Batch) -> Losses:
        """Denoising on G0's samples (Sec. 4.1); the fake score's first walk, with the student standing still."""
        return self.on_the_way.denoise(nets, batch)[0]

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        if self.config.stage == "backtrack":
            _, method = self._asked(step)
            method.after_step(nets, step, ran)
            if method is self.on_the_way:
                # What it has learnt, f_distill's mean ratios say, is of student and data, whichever the target.
                self.base.load_state_dict(method.state_dict())
            if step == 0:
                self._check_recorded(nets)
            return
        done, rest = divmod(step + 1, self.config.interval)
        if rest == 0 and f"path_{done}" in self._records:
            nets.modules[f"path_{done}"].load_state_dict(unwrap(nets.fake_score).state_dict())

    def _check_recorded(self, nets: Networks) -> None:
        """A record that is still the teacher would lead nowhere, and nothing else would tell."""
        # What the records start as.
        teacher = list(unwrap(nets.teacher).backbone().parameters())
        for name in self._records:
            pairs = zip(nets.modules[name].parameters(), teacher, strict=True)
            if all(torch.equal(p, q) for p, q in pairs):
                least = self.config.interval * (self.config.path - 1)
                raise UserError(
                    f"method.path={self.config.path}: the degrade stage recorded no {name}; give it run.steps of at"
                    f" least {least} (better {least + self.config.interval}) at method.interval={self.config.interval}."
                )

    def averaged(self, nets: Networks, average: Callable[[Tensor], Tensor]) -> None:
        self.base.averaged(nets, average)
        self.on_the_way.load_state_dict(self.base.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for method in (self.base, self.on_the_way):
            method.load_state_dict(state)


def _base(config: Any) -> tuple[type[ScoreDistillation], Any]:
    """The base method's class and configuration."""
    from stepdistill.methods import METHODS

    section = dict(config.base)
    cls = resolve(section.pop("name", ""), METHODS, "method", where="method.base.name")
    if not issubclass(cls, ScoreDistillation):
        raise UserError(
            f"method.base must be a method with a fake score, such as dmd2 or sid, not {cls.__name__}."
        )
    if issubclass(cls, PhasedDMD):
        raise UserError(
            f"method.base.name={config.base['name']}: it has a fake score for each phase, of which disback would record and"
            " carry the first alone; set it to dmd2, or use phased_dmd without disback."
        )
    own = configuration.build(cls.Config, section, "method.base")
    # Ours, and of no teacher: a record that learnt by places would be asked as the teacher is, of none.
    if own.tell_place:
        raise UserError(
            "method.base.tell_place=true: disback's records stand in the teacher's place, and a teacher is told no time of"
            " an answer; set it to false."
        )
    return cls, own


def _unguided(own: Any) -> Any:
    """The base's configuration for recorded targets."""
    plain = {name: value for name, value in UNGUIDED.items() if hasattr(own, name)}
    flow_map = getattr(own, "flow_map", None)
    # anyflow's, which asks the target as well; from data it asks none.
    if flow_map is not None and flow_map.direction == "teacher":
        plain["flow_map"] = replace(flow_map, guidance_low=1.0, guidance_high=1.0)
    return replace(own, **plain)


def _towards(loss: LossFn, target: int) -> LossFn:
    """`loss` with s'_target in the teacher's place; 0 is the teacher."""
    if target == 0:
        return loss

    @functools.wraps(loss)
    def redirected(nets: Networks, batch: Batch) -> Losses:
        modules = nets.modules | {"teacher": nets.modules[f"path_{target}"]}
        return loss(Networks(modules, nets.schedule, nets.decode), batch)

    return redirected
