"""The contract of a method: which networks it needs, and in which order which of them train on what.

A method is a config dataclass, a few loss functions in the paper's order, and `phases`, which says whose turn
it is. It never sees accelerate, devices, autocast, files or loggers; if it needs one, the trainer is missing
a feature.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser, guided, map_cond, unwrap
from stepdistill.errors import UserError
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Schedule, expand

# Named values, each a scalar or one number per sample (B,). "total" is back-propagated, the rest is logged.
Losses = dict[str, Tensor]
# Normal ranges of what every method logs, as `Method.health` has its own.
# Where the reference is a posterior mean it spreads less than samples do, and the ratio is above 1 in health.
COMMON_HEALTH: dict[str, tuple[float, float, str]] = {
    "student/x0_std_ratio": (
        0.5,
        2.5,
        "collapse below, saturation above: lower optim.student.lr or method.guidance_scale; where there is a fake"
        " score, train it more often",
    ),
    "student/x0_shift": (
        -0.5,
        0.5,
        "brightness drift: lower optim.student.lr; where there is a fake score, raise method.student_every",
    ),
    # Of `training.seeds`, beside the teacher's samples of the same prompts and seeds.
    "samples/std_ratio": (
        0.8,
        1.25,
        "saturation above, washed out below: lower method.guidance_scale, method.augmentation or optim.student.lr",
    ),
    "samples/seed_spread": (
        0.6,
        1.6,
        "collapse below: lower optim.student.lr or set method.diversity_weight; prompts not learnt above: raise run.steps",
    ),
    "student/grad_norm_growth": (
        0.0,
        30.0,
        "divergence: lower optim.student.lr or set optim.max_grad_norm",
    ),
}


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
    """One process's part of one phase's fresh batch of B samples.

    Attributes:
        cond: the samples' conditions as `Family.encode` gives them: a tensor or a dict of tensors, batch first, such
            as (B, tokens, width) of a text encoder or (B,) class indices; None for families without conditions.
        uncond: the empty condition in the same form, once per sample, for guidance and dropout.
        shape: of one x0, without the batch.
        index: positions in the global batch (B,), from which `generator` draws.
        x0: real data (B, *shape), or None when the run has none.
        pairs: as many trajectories as samples, of their own conditions, or None.
        prompts: what the conditions were encoded from, captions or class indices (reward models read them).
        examples: numbers of the samples in the data, for messages.
    """

    cond: Cond
    uncond: Cond
    shape: tuple[int, ...]
    index: Tensor
    generator: SampleNoise
    x0: Tensor | None = None
    pairs: Pairs | None = None
    prompts: Sequence[str] | Sequence[int] | None = None
    examples: Sequence[int] | None = None

    def randn(self) -> Tensor:
        """Fresh standard normal noise in the shape of x0."""
        return self.generator.randn(*self.shape)

    def dropped_cond(self, share: float) -> Cond:
        """`cond` with `uncond` in its place for that share of the samples, drawn at random; what guidance
        needs a network to have learnt (Ho & Salimans 2022).
        """
        return self.dropped(share)[0]

    def dropped(self, share: float) -> tuple[Cond, Tensor]:
        """`dropped_cond`, and which samples lost theirs, (B,) bool."""
        if not share or self.uncond is None:
            return self.cond, torch.zeros_like(self.index, dtype=torch.bool)
        drop = self.generator.rand() < share
        return self.without(drop), drop

    def without(self, drop: Tensor) -> Cond:
        """`cond` with `uncond` in the place of those samples' that `drop` (B,) bool names."""
        if self.uncond is None:
            return self.cond
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

    @property
    def sigma_data(self) -> float:
        """The data's standard deviation, in whose units densities of noise levels are stated."""
        return unwrap(self.student).sigma_data

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
        sampling: how the student is sampled, and so what it is trained for; None = the paper's, one step.
    """

    @dataclass
    class Config:
        pass

    needs_teacher: ClassVar[bool] = True
    # Whether a loss looks at images, decoded by `Networks.decode`.
    needs_decoder: ClassVar[bool] = False
    # It is for models of codes, whose students say logits of codes and whose states are codes and noise.
    for_codes: ClassVar[bool] = False
    # What it leaves takes any number of steps by DDIM, and no later stage inherits its sampling.
    many_steps: ClassVar[bool] = False
    # What it leaves is a teacher for other methods. (A method may do without one and leave a student.)
    leaves_teacher: ClassVar[bool] = False
    # The rules (`sampling.RULES`) its student may be sampled by.
    rules: ClassVar[tuple[str, ...]] = ("renoise", "ode", "tcd")
    # Networks whose weights a stage takes over from networks of the same names of the stage before, key by key
    # (the student always is). Any other network is made anew.
    carried: tuple[str, ...] = ()
    # Where the frozen networks lie that a loss sees images through, which then cannot judge. Asking makes them.
    trained_on: tuple[str, ...] = ()
    # Normal ranges of logged values, "phase/name": (low, high, likely cause when it is left). The trainer
    # shows them in previews and warns; what is common to all methods is in COMMON_HEALTH.
    health: ClassVar[dict[str, tuple[float, float, str]]] = {}

    def __init__(self, config: Any, sampling: Sampling | None = None):
        self.config = config
        _check_settings(config)
        self.sampling = sampling or Sampling.of((1,), self.sampled(config))
        if not self.sampling.steps:
            raise UserError("student.steps must list whole numbers of at least 1, got [].")
        if self.sampling.rule not in self.rules:
            raise UserError(
                f"student.rule must be {' or '.join(self.rules)} for {type(self).__name__}, got {self.sampling.rule}."
            )

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        """What the paper says of how its student is sampled: fields of `Sampling` by name. A recipe's `student:`
        section overrides them; what is not named is as the stage before left it.

        inputs, guidance and scale are never inherited: a student is told what this method tells it.
        """
        return {}

    @property
    def needs_captions(self) -> bool:
        """Whether a loss reads prompts as texts, which classes are not."""
        return False

    @property
    def needs_images(self) -> bool:
        """Whether batches must carry real x0."""
        return False

    def pairs(self, schedule: Schedule) -> PairSettings | None:
        """The teacher's trajectories batches must carry, if any; they are computed once and cached."""
        return None

    def student_over(self, base: Denoiser) -> Denoiser | None:
        """A student that holds the weights of `base` by reference and trains others; None = a whole network."""
        return None

    def networks(self, teacher: Denoiser | None, student: Denoiser) -> dict[str, nn.Module]:
        """Extra networks by name, made from the teacher or the student at the start of the run."""
        return {}

    def phases(self, step: int) -> Iterator[Phase]:
        """Whose turn it is in loop iteration `step`; the order is the order of updates."""
        raise NotImplementedError

    def after_step(self, nets: Networks, step: int, ran: tuple[str, ...]) -> None:
        """Curriculum: called after every iteration with the names of the phases that ran."""

    def averaged(self, nets: Networks, average: Callable[[Tensor], Tensor]) -> None:
        """Running statistics, of which each of several processes has its own samples', become one: the checkpoint holds those
        of the first. Called after `after_step`; average: a tensor's mean over processes.
        """

    def state_dict(self) -> dict[str, Any]:
        """Whatever a curriculum must remember, as plain values that JSON can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _check_settings(config: Any) -> None:
    """UserError for a weight, spread or scale below nothing or a share of no whole, by the names all methods give them."""
    for name, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        nonnegative = name.endswith(("weight", "_std")) or "guidance" in name
        if nonnegative and not 0 <= value < math.inf:
            raise UserError(f"method.{name} must be 0 or more, got {value:g}.")
        if name.endswith(("dropout", "_share")) and not 0 <= value <= 1:
            raise UserError(f"method.{name} must be a share from 0 to 1, got {value:g}.")
        if name.endswith("_ema") and not 0 <= value < 1:
            raise UserError(f"method.{name} must be at least 0 and below 1, got {value:g}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"method.{name} must be a finite number, got {value:g}.")


@contextlib.contextmanager
def addressed(where: str) -> Iterator[None]:
    """What a method inside another refuses is named by its place in the recipe: `where` instead of "method"."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\bmethod\.", f"{where}.", str(error))) from None


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
    # At t_min for all: where no signal is left, the side that is not taken would have no finite gradient.
    alpha = schedule.alpha(prediction.t.clamp(max=schedule.t_min))
    return torch.where(clean, x_t / expand(alpha, x_t), prediction.x0)


def term_name(loss: LossFn) -> str:
    """What messages call a term: its function's name, after its part's in a composition."""
    return getattr(loss, "__name__", None) or term_name(loss.func)
