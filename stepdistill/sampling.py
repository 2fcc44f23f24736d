"""How a student is sampled, as one frozen value, and the one few-step rule.

Previews, evaluation, the app, backward simulation and the export test all walk by a `Sampling`; what a student
is trained on is therefore what it is sampled by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.errors import UserError
from stepdistill.prediction import Prediction
from stepdistill.schedule import Schedule, expand, times_like

Rule = Literal["renoise", "ode", "tcd", "flowmap"]
InitNoise = Literal["unit", "sigma"]
Guidance = Literal["none", "input", "cfg"]
RULES: tuple[str, ...] = get_args(Rule)
# Of a grid: ten times what the longest table has.
MOST_STEPS = 10_000

Predict = Callable[..., Prediction]

# Settings that not every rule looks at: the ODE's grid begins and goes on where the schedule says.
_HEARD_BY: dict[str, tuple[str, ...]] = {
    "first_rho": ("renoise", "tcd", "flowmap"),
    "middle_time": ("renoise", "tcd", "flowmap"),
    "eta": ("tcd",),
}

# What a later stage takes over from the stage before, where its method and its recipe say nothing.
_INHERITED = ("rule", "first_rho", "init_noise", "eta", "finest", "middle_time")


@dataclass(frozen=True)
class Sampling:
    """How a student is sampled. It belongs to the student: a method gives its paper's values, a recipe's
    `student:` section overrides them, later stages inherit them, and the student's card stores them.

    Attributes:
        steps: the step counts the student is made for; () for a many-step model, which takes any.
        rule: how it moves from one time to the next, see `walk`.
        first_rho: the noise-to-signal ratio it starts from; 0 = the schedule's end.
        init_noise: its first state. "unit": unit noise z, as `LCMScheduler` starts from, though a VP table's
            last entry is not quite pure noise (DMD2, LCM). "sigma": sigma_t z, a state with no signal in it
            (SiD, SIM), for one step only: where more renoise in between, stock schedulers start from z.
            Outside VP the two are one.
        eta: of the rule "tcd": 0 draws no noise between steps, 1 forgets the state before.
        finest: points of the grid all step counts are taken from (a scheduler's `original_inference_steps`);
            0 = the most of `steps`.
        middle_time: the second time of two steps, as an angle of TrigFlow (`SCMScheduler`'s intermediate timestep): a
            noise-to-signal ratio of tan(middle_time) under any other schedule but EDM's, whose stock scheduler
            lists points of one grid; 0 = the grid's.
        inputs: what the network is told besides x_t, t and cond: "guidance" (B,), LCM's embedded scale, or
            "end" (B,), the time a two-time student jumps to.
        guidance: "none": one scale is distilled into the weights; "input": the scale is an input of the
            network; "cfg": classifier-free guidance, two network calls per step.
        scale: the guidance scale g of uncond + g (cond - uncond) used where none is asked for; 1 = off.

    Raises:
        UserError: a value out of range, named as the recipe's `student.<field>`.
    """

    steps: tuple[int, ...] = (1,)
    rule: Rule = "renoise"
    first_rho: float = 0.0
    init_noise: InitNoise = "unit"
    eta: float = 0.0
    finest: int = 0
    middle_time: float = 0.0
    inputs: tuple[str, ...] = ()
    guidance: Guidance = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (("rule", Rule), ("init_noise", InitNoise), ("guidance", Guidance)):
            known, value = get_args(kind), getattr(self, name)
            if value not in known:
                raise UserError(f"student.{name} must be one of {', '.join(known)}, got {value!r}.")
        if self.steps and min(self.steps) < 1:
            raise UserError(f"student.steps must list whole numbers of at least 1, got {list(self.steps)}.")
        for name, value in (("steps", max(self.steps, default=0)), ("finest", self.finest)):
            if value > MOST_STEPS:
                raise UserError(f"student.{name} must be at most {MOST_STEPS:,}, got {value}.")
        if not self.first_rho >= 0:
            raise UserError(
                f"student.first_rho must be 0 (the schedule's end) or more, got {self.first_rho:g}."
            )
        if not 0 <= self.eta <= 1:
            raise UserError(f"student.eta must be between 0 and 1, got {self.eta:g}.")
        if self.finest and self.steps and self.finest < max(self.steps):
            raise UserError(
                f"student.steps must be at most the {self.finest} points of the grid they are taken from"
                f" (student.finest, or lcm's method.ddim_steps), got {max(self.steps)}."
            )

    @classmethod
    def of(cls, steps: Sequence[int], *layers: Mapping[str, Any]) -> Sampling:
        """The sampling of a student of these step counts: of several layers of named values the last that names
        a value wins; None names nothing.
        """
        named: dict[str, Any] = {}
        for layer in layers:
            named |= {key: value for key, value in layer.items() if value is not None}
        if tuple(steps) != (1,):
            named.pop("init_noise", None)
        return cls(steps=tuple(steps), **named)

    def inherited(self) -> dict[str, Any]:
        """What a later stage takes over unless it says otherwise. Inputs and guidance are each method's own."""
        return {name: value for name, value in asdict(self).items() if name in _INHERITED}

    def hears(self, name: str) -> bool:
        """Whether the setting `name` of a recipe's `student:` section makes a difference to the rule."""
        return self.rule in _HEARD_BY.get(name, RULES)

    @property
    def points(self) -> int:
        """Of the finest grid; at least 1."""
        return self.finest or max(self.steps, default=1)

    def grid(self, schedule: Schedule, steps: int) -> tuple[float, ...]:
        """The times a student of `steps` steps is called at, falling: those its stock scheduler lists.

        Raises:
            ValueError: steps is not at least 1 or exceeds the finest grid.
        """
        if self.rule == "ode":
            return (
                schedule.few_step_ode_grid(steps, self.points) if self.steps else schedule.teacher_grid(steps)
            )
        # A model of any number of steps has no finer grid.
        finest = self.points if self.steps else steps
        grid = schedule.few_step_grid(steps, finest, self.first_rho)
        middle = schedule.at_angle(self.middle_time) if steps == 2 and self.middle_time else None
        return grid if middle is None else (grid[0], middle)

    def first_input(self, schedule: Schedule, z: Tensor, t: float) -> Tensor:
        """The student's first state at time t, from unit noise z (B, ...)."""
        return schedule.first_state(z, t) if self.init_noise == "unit" else schedule.pure_noise(z, t)

    def walk(
        self,
        predict: Predict | Denoiser,
        x_t: Tensor,
        times: Sequence[float],
        noise: Callable[[int], Tensor],
        cond: Cond = None,
        *,
        on_step: Callable[[int, int], None] | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """From the state x_t (B, ...) at times[0] to the state at times[-1], one prediction per interval.

        renoise: x_s = alpha_s x0 + sigma_s eps', fresh eps' = noise(i) (LCM, DMD2, sCM). ode: x_s = alpha_s x0
        + sigma_s eps, the prediction's own eps (DDIM). tcd: the ode's move to a time below s, then noise up to
        s; eta in [0, 1] goes from ode to (almost) renoise (Zheng et al. 2024, arXiv 2402.19159, Alg. 2).
        flowmap: the ode's move by a two-time network that is told where it ends (MeanFlow).
        """
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            s_ = times_like(s, x_t)
            prediction = predict(x_t, times_like(t, x_t), cond, **self._inputs(inputs, s_))
            if self.rule == "renoise":
                x_t = prediction.schedule.add_noise(prediction.x0, noise(i), s_)
            elif self.rule == "tcd" and self.eta > 0:
                x_t = _strategic_step(prediction, s_, noise(i), self.eta)
            else:
                x_t = prediction.at(s_)
            if on_step:
                on_step(i + 1, len(times))
        return x_t

    def sample(
        self,
        predict: Predict | Denoiser,
        x_t: Tensor,
        times: Sequence[float],
        noise: Callable[[int], Tensor],
        cond: Cond = None,
        *,
        t_min: float = 0.0,
        on_step: Callable[[int, int], None] | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """x0 by len(times) predictions: `walk` to the last time, then its x0. No noise is added after the
        last one.

        t_min: the schedule's end, to which "tcd" and "flowmap" jump last. As with `TCDScheduler`, the result of
        "tcd" is the state there, not x0.
        """
        x_t = self.walk(predict, x_t, times, noise, cond, on_step=on_step, **inputs)
        end = times_like(t_min, x_t)
        prediction = predict(x_t, times_like(times[-1], x_t), cond, **self._inputs(inputs, end))
        x0 = prediction.at(end) if self.rule == "tcd" else prediction.x0
        if on_step:
            on_step(len(times), len(times))
        return x0

    def _inputs(self, inputs: dict[str, Tensor], end: Tensor) -> dict[str, Tensor]:
        return inputs | {"end": end} if self.rule == "flowmap" else inputs


# Of a model that takes any number of steps: DDIM with guidance at sampling time.
MANY_STEPS = Sampling(steps=(), rule="ode", guidance="cfg")


def _strategic_step(prediction: Prediction, s: Tensor, noise: Tensor, eta: float) -> Tensor:
    """Along the prediction's line to the time (1 - eta) s, then diffused up to s, as `TCDScheduler` steps."""
    schedule, x_t = prediction.schedule, prediction.x_t
    below = schedule.t_min + (1 - eta) * (s - schedule.t_min)
    if schedule.discrete:
        below = below.float().floor().double()
    ratio = schedule.alpha(s) / schedule.alpha(below)
    spread = (schedule.sigma(s) ** 2 - (ratio * schedule.sigma(below)) ** 2).clamp(min=0).sqrt()
    return expand(ratio, x_t) * prediction.at(below) + expand(spread, x_t) * noise
