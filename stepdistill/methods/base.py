"""The contract of a method: which networks it needs, and in which order which of them train on what.

A method is a config dataclass, a few loss functions in the paper's order, and `phases`, which says whose turn
it is. It never sees accelerate, devices, autocast, files or loggers; if it needs one, the trainer is missing
a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill import config as configuration
from stepdistill.denoiser import Cond, Denoiser, guided, map_cond
from stepdistill.errors import UserError
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.registry import resolve
from stepdistill.sampling import first_input, walk
from stepdistill.schedule import Schedule, expand
from stepdistill.timesteps import few_step_grid, teacher_grid

# Named values, each a scalar or one number per sample (B,). "total" is back-propagated, the rest is logged.
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class PairSettings:
    """What a method wants computed once before training: trajectories of the guided teacher's ODE.

    count: how many; steps: DDIM steps of each; times: where, besides both ends, the state is kept.
    """

    count: int
    steps: int
    guidance_scale: float = 1.0
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("pair_count", self.count), ("pair_steps", self.steps)):
            if value < 1:
                raise UserError(f"method.{name} must be at least 1, got {value}.")


@dataclass
class Pairs:
    """Trajectories: unit noise z (B, *shape) -> x0 (B, *shape), the conditions they were drawn under, and the
    states (B, K, *shape) at the K times asked for.
    """

    z: Tensor
    x0: Tensor
    states: Tensor
    cond: Cond


@dataclass
class Batch:
    """One process's part of one phase's fresh batch. Conditions arrive encoded.

    index: positions in the global batch (B,), from which `generator` draws; x0: real data (B, *shape) or None
    when the run has none; pairs: as many trajectories as samples, of their own conditions, or None.
    prompts: what the conditions were encoded from, captions or class indices (reward models read them).
    """

    cond: Cond
    uncond: Cond
    shape: tuple[int, ...]
    index: Tensor
    generator: SampleNoise
    x0: Tensor | None = None
    pairs: Pairs | None = None
    prompts: Sequence[str] | Sequence[int] | None = None

    def randn(self) -> Tensor:
        """Fresh standard normal noise in the shape of x0."""
        return self.generator.randn(*self.shape)

    def dropped_cond(self, share: float) -> Cond:
        """`cond` with `uncond` in its place for that share of the samples, drawn at random; what guidance
        needs a network to have learnt (Ho & Salimans 2022).
        """
        if not share or self.cond is None:
            return self.cond
        drop = self.generator.rand()[:, None] < share
        return map_cond(
            lambda c, u: c.where(~drop.reshape(-1, *[1] * (c.ndim - 1)), u), self.cond, self.uncond
        )


class Networks:
    """The denoisers and extras of a run by name, as attributes, plus what the family offers.

    schedule: what all denoisers are spoken to in. decode: x0 -> images in [0, 1], differentiable.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        schedule: Schedule,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.modules, self.schedule, self.decode = modules, schedule, decode

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["modules"][name]
        except KeyError:
            raise AttributeError(
                f"no network {name!r}; there are {', '.join(self.__dict__['modules'])}"
            ) from None

    def scoped(self, scope: str) -> Networks:
        """The view a part of a composition has: its own "scope/name" networks by their plain names, and the
        common ones.
        """
        own = {
            name.split("/", 1)[1]: module
            for name, module in self.modules.items()
            if name.startswith(f"{scope}/")
        }
        return Networks(self.modules | own, self.schedule, self.decode)


LossFn = Callable[[Networks, Batch], Losses]


@dataclass(frozen=True)
class Phase:
    """One optimiser step: train `trains` on the weighted sum of `terms`, everything else frozen.

    name is the log prefix and the timer: "student", "critic". Terms are back-propagated one after another, so
    only one of their graphs is alive at a time.
    """

    name: str
    trains: tuple[str, ...]
    terms: tuple[tuple[float, LossFn], ...]


class Method:
    """Base of all methods.

    Args:
        config: this class's `Config`.
        steps: the numbers of sampling steps the student is to serve, such as (1, 2, 4).
    """

    @dataclass
    class Config:
        pass

    needs_teacher: ClassVar[bool] = True
    # What the student alone is told besides x_t, t and cond: "guidance" (LCM's embedded scale), "end" (the
    # time a two-time student jumps to).
    student_extras: ClassVar[tuple[str, ...]] = ()
    rule: ClassVar[str] = "renoise"  # how its student is sampled, one of sampling.RULES
    # Its student was taught one guidance scale and takes none; otherwise the scale is an argument at
    # sampling.
    guidance_free: ClassVar[bool] = True
    # Networks whose weights a stage takes over from networks of the same names of the stage before, key by key
    # (the student always is). Any other network is made anew.
    carried: tuple[str, ...] = ()
    # Normal ranges of logged values, "phase/name": (low, high, likely cause when it is left). The trainer
    # shows them in previews and warns; what is common to all methods is in training/health.py.
    health: ClassVar[dict[str, tuple[float, float, str]]] = {}

    def __init__(self, config: Any, steps: Sequence[int] = (1,)):
        self.config, self.steps = config, tuple(steps)
        self.sampled_as: Method = (
            self  # whose rule and times roll the student out; a composition's first part
        )
        if not self.steps or min(self.steps) < 1:
            raise UserError(f"student.steps must list whole numbers of at least 1, got {list(self.steps)}.")
        if (rho := getattr(config, "first_rho", 0.0)) < 0:
            raise UserError(f"method.first_rho must be 0 (the schedule's end) or more, got {rho:g}.")

    @property
    def needs_images(self) -> bool:
        """Whether batches must carry real x0."""
        return False

    def pairs(self, schedule: Schedule) -> PairSettings | None:
        """The teacher's trajectories batches must carry, if any; they are computed once and cached."""
        return None

    @property
    def guidance_scale(self) -> float:
        """The scale previews and the exported card use by default."""
        return 1.0

    @property
    def finest(self) -> int:
        """Points of the grid all step counts are taken from (a scheduler's `original_inference_steps`)."""
        return max(self.steps)

    @property
    def eta(self) -> float:
        """Of the rule "tcd": 0 draws no noise between steps, 1 forgets the state before."""
        return 0.0

    @property
    def init_noise(self) -> str:
        """What the student's first state is made of, one of `sampling.INIT_NOISE`.

        LCMScheduler, the stock scheduler that renoises between steps, starts from unit noise.
        """
        return getattr(self.config, "init_noise", "unit") if self.steps == (1,) else "unit"

    @property
    def first_rho(self) -> float | None:
        """The noise-to-signal ratio of the student's first time; None = the schedule's end."""
        return getattr(self.config, "first_rho", 0.0) or None

    def grid(self, schedule: Schedule, steps: int) -> tuple[float, ...]:
        """The times a student of `steps` steps is called at: those its stock scheduler lists."""
        if self.rule == "ode":
            return teacher_grid(schedule, steps)
        return few_step_grid(schedule, steps, self.finest, self.first_rho)

    def networks(self, teacher: Denoiser | None, student: Denoiser) -> dict[str, nn.Module]:
        """Extra networks by name, made from the teacher or the student at the start of the run."""
        return {}

    def phases(self, step: int) -> Iterator[Phase]:
        """Whose turn it is in loop iteration `step`; the order is the order of updates."""
        raise NotImplementedError

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        """Curriculum: called after every iteration with the names of the phases that ran."""

    def state_dict(self) -> dict[str, Any]:
        """Whatever a curriculum must remember; tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def guided_teacher(
    nets: Networks, batch: Batch, scale: float, schedule: Schedule
) -> Callable[[Tensor, Tensor], Prediction]:
    """The teacher with the batch's condition and guidance applied, asked in `schedule`: what a solver takes."""

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        asked = partial(nets.teacher, in_schedule=schedule)
        return guided(asked, x_t, t, batch.cond, batch.uncond, scale)

    return predict


def consistency(prediction: Prediction) -> Tensor:
    """f(x_t, t): the network's x0, and x_t / alpha itself where no noise is left, the boundary condition of
    every consistency function (Song et al. 2023, arXiv 2303.01469, Sec. 3).
    """
    schedule, x_t = prediction.schedule, prediction.x_t
    clean = expand(prediction.t, x_t) <= schedule.t_min
    return torch.where(clean, x_t / expand(schedule.alpha(prediction.t), x_t), prediction.x0)


def track_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, parameter by parameter: a consistency target network."""
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)


Simulated = Literal["states", "counts", "passes", "longest"]


def simulate(
    method: Method,
    nets: Networks,
    batch: Batch,
    late: float = 0.0,
    by: Simulated = "states",
    **extras: Tensor,
) -> tuple[Tensor, Tensor, float]:
    """Backward simulation (DMD2, arXiv 2405.14867, Sec. 4.5): the state the student meets at one of its own
    sampling steps.

    Draws a step count of `method.steps` and a position K in its grid, one for the whole global batch, and
    rolls the student out to there without gradient, by the very rule that samples it later. K = 0 is the
    method's first state, pure noise.

    by: "states" meets every (count, K) alike, so that the last ones of a long grid hold; "counts" every count,
    which favours pure noise; "passes" a count the rarer the longer it is (probability over 1 / count), which
    spends as much on one step as on many; "longest" the states of the longest count alike and no others.
    late: positions before that fraction of the grid are left out.

    Returns:
        x_t (B, ...), t (B,) and t as a number.
    """
    schedule, method = nets.schedule, method.sampled_as
    states = [(count, place) for count in method.steps for place in range(int(late * count), count)]
    if by != "states":
        counts = list(method.steps)
        if by == "longest":
            counts = [max(counts)]
        elif by == "passes":
            counts = [count for count in counts for _ in range(math.lcm(*counts) // count)]
        only = counts[batch.generator.shared_randint(0, len(counts))]
        states = [(count, place) for count, place in states if count == only]
    count, place = states[batch.generator.shared_randint(0, len(states))]
    grid = method.grid(schedule, count)[: place + 1]
    with torch.no_grad():
        x = first_input(schedule, batch.randn(), grid[0], method.init_noise)
        rule = {"rule": method.rule, "eta": method.eta}
        x_t = walk(nets.student, x, grid, lambda _: batch.randn(), batch.cond, **rule, **extras)
    return x_t, torch.full((x_t.shape[0],), grid[-1], dtype=torch.float64, device=x_t.device), grid[-1]


class Compose(Method):
    """Several methods at once: phases that train the same networks become one optimiser step on the sum of
    their losses.

    Extras are named "part/name", so two parts may both have a discriminator. SANA-Sprint is
    `parts: [{name: scm}, {name: ladd, weight: 0.5}]`. The parts' student phases become one, whatever else each
    trains beside the student; what they log there is named "part/value", and normal ranges are each part's own.
    """

    @dataclass
    class Config:
        parts: list[dict] = field(
            default_factory=list
        )  # each a method section: name, its keys, and weight (default 1)
        # "agreed": all parts sample the student by one rule at the same times, or it is an error. "first": the
        # first part says how it is sampled, and the others roll it out so.
        sampling: Literal["agreed", "first"] = "agreed"

    def __init__(self, config: Any, steps: Sequence[int] = (1,)):
        super().__init__(config, steps)
        from stepdistill.methods import METHODS

        if len(config.parts) < 2:
            raise UserError(
                f"method.parts must list at least two methods to compose, got {len(config.parts)}."
            )
        self.parts: list[tuple[str, float, Method]] = []
        for number, part in enumerate(config.parts):
            section = dict(part)
            name, weight = section.pop("name", ""), float(section.pop("weight", 1.0))
            where = f"method.parts.{number}"
            cls = resolve(name, METHODS, "method", where=f"{where}.name")
            scope = name.split(":")[-1]  # one's own class by its name alone
            if scope in (taken for taken, *_ in self.parts):
                scope = f"{scope}{number}"
            self.parts.append((scope, weight, cls(configuration.build(cls.Config, section, where), steps)))
        extras = {part.student_extras for _, _, part in self.parts}
        rules = {part.rule for _, _, part in self.parts}
        times = {(part.finest, part.first_rho, part.init_noise) for _, _, part in self.parts}
        if len(extras) > 1 or (config.sampling == "agreed" and (len(rules) > 1 or len(times) > 1)):
            raise UserError(
                "method.parts cannot be composed: their students take different inputs, times or sampling rules"
                " (for rules and times, method.sampling=first makes the first part's hold)."
            )
        first = self.parts[0][2]
        for _, _, part in self.parts:
            part.sampled_as = first
        self.student_extras, self.rule = extras.pop(), first.rule
        self.guidance_free = all(part.guidance_free for _, _, part in self.parts)
        self.needs_teacher = any(part.needs_teacher for _, _, part in self.parts)
        self.health = {  # the student's phase is merged, the others have their part's name in front
            f"student/{scope}/{name[8:]}" if name.startswith("student/") else f"{scope}/{name}": limits
            for scope, _, part in self.parts
            for name, limits in part.health.items()
        }

    @property
    def needs_images(self) -> bool:
        return any(part.needs_images for _, _, part in self.parts)

    @property
    def carried(self) -> tuple[str, ...]:
        return tuple(f"{scope}/{name}" for scope, _, part in self.parts for name in part.carried)

    def pairs(self, schedule: Schedule) -> PairSettings | None:
        wanted = {settings for _, _, part in self.parts if (settings := part.pairs(schedule))}
        if len(wanted) > 1:
            raise UserError("method.parts cannot be composed: two of them want different trajectory pairs.")
        return wanted.pop() if wanted else None

    @property
    def guidance_scale(self) -> float:
        return self.parts[0][2].guidance_scale

    @property
    def finest(self) -> int:
        return self.parts[0][2].finest

    @property
    def eta(self) -> float:
        return self.parts[0][2].eta

    @property
    def init_noise(self) -> str:
        return self.parts[0][2].init_noise

    @property
    def first_rho(self) -> float | None:
        return self.parts[0][2].first_rho

    def grid(self, schedule: Schedule, steps: int) -> tuple[float, ...]:
        return self.parts[0][2].grid(schedule, steps)

    def networks(self, teacher: Denoiser | None, student: Denoiser) -> dict[str, nn.Module]:
        return {
            f"{scope}/{name}": network
            for scope, _, part in self.parts
            for name, network in part.networks(teacher, student).items()
        }

    def phases(self, step: int) -> Iterator[Phase]:
        merged: dict[tuple[str, ...], Phase] = {}
        for scope, weight, part in self.parts:
            for phase in part.phases(step):
                trains = tuple(name if name == "student" else f"{scope}/{name}" for name in phase.trains)
                told = f"{scope}/" if phase.name == "student" else ""
                terms = tuple((weight * w, _scope_loss(loss, scope, told)) for w, loss in phase.terms)
                name = phase.name if phase.name == "student" else f"{scope}/{phase.name}"
                key = ("student",) if "student" in trains else trains
                if key in merged:
                    before = merged[key]
                    name, trains = before.name, tuple(dict.fromkeys(before.trains + trains))
                    # Processes synchronise in the last backward pass, which must reach all that is trained.
                    wider = len(before.trains) > len(phase.trains)
                    terms = terms + before.terms if wider else before.terms + terms
                merged[key] = Phase(name, trains, terms)
        # A part that leaves the student out this time may have been the first to name a critic.
        yield from sorted(merged.values(), key=lambda phase: "student" not in phase.trains)

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        for scope, _, part in self.parts:
            part.after_step(nets.scoped(scope), step, tuple(name.removeprefix(f"{scope}/") for name in ran))

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{scope}/{key}": value
            for scope, _, part in self.parts
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for scope, _, part in self.parts:
            own = {key.split("/", 1)[1]: value for key, value in state.items() if key.startswith(f"{scope}/")}
            part.load_state_dict(own)


def _scope_loss(loss: LossFn, scope: str, told: str) -> LossFn:
    """`loss` with its part's networks; what it logs beside the total gets `told` in front."""

    def scoped(nets: Networks, batch: Batch) -> Losses:
        losses = loss(nets.scoped(scope), batch)
        return {name if name == "total" else told + name: value for name, value in losses.items()}

    scoped.__name__ = f"{scope}.{term_name(loss)}"
    return scoped


def term_name(loss: LossFn) -> str:
    """What messages call a term: its function's name, after its part's in a composition."""
    return getattr(loss, "__name__", None) or term_name(loss.func)
