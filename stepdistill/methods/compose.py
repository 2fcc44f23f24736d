"""Several methods at once, on one student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from stepdistill import config as configuration
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.methods.base import (
    Batch,
    Losses,
    LossFn,
    Method,
    Networks,
    PairSettings,
    Phase,
    addressed,
    term_name,
)
from stepdistill.registry import resolve
from stepdistill.sampling import RULES, Sampling
from stepdistill.schedule import Schedule


class Part(NamedTuple):
    """One method of a composition: the prefix of its networks and values, its weight, itself."""

    scope: str
    weight: float
    method: Method


class Compose(Method):
    """Several methods at once: phases that train the same networks become one optimiser step on the sum of
    their losses.

    Extras are named "part/name", so two parts may both have a discriminator. SANA-Sprint is
    `parts: [{name: scm}, {name: ladd, weight: 0.5}]`. The parts' student phases become one, whatever else each
    trains beside the student; what they log there is named "part/value", and normal ranges are each part's own.
    """

    rules = RULES

    @dataclass
    class Config:
        # Each a method section: name, its keys, and weight (default 1).
        parts: list[dict] = field(default_factory=list)
        # "agreed": no two parts name different rules or times for the student, or it is an error. "first": the
        # first part says how it is sampled. Either way all roll it out so.
        sampling: Literal["agreed", "first"] = "agreed"

    def __init__(self, config: Any, sampling: Sampling | None = None):
        super().__init__(config, sampling)
        self.parts: list[Part] = []
        for number, (scope, weight, part, own) in enumerate(_parts(config)):
            with addressed(f"method.parts.{number}"):
                self.parts.append(Part(scope, weight, part(own, self.sampling)))
        self.needs_teacher = any(part.method.needs_teacher for part in self.parts)
        self.leaves_teacher = all(part.method.leaves_teacher for part in self.parts)
        self.needs_decoder = any(part.method.needs_decoder for part in self.parts)
        # The student's phase is merged, the others have their part's name in front.
        self.health = {
            f"student/{part.scope}/{name[8:]}"
            if name.startswith("student/")
            else f"{part.scope}/{name}": limits
            for part in self.parts
            for name, limits in part.method.health.items()
        }

    @classmethod
    def sampled(cls, config: Any) -> dict[str, Any]:
        """What the parts say together, or the first of them."""
        said = [part.sampled(own) for _, _, part, own in _parts(config)]
        inputs = {tuple(one.get("inputs", ())) for one in said}
        named: dict[str, Any] = {}
        clash = len(inputs) > 1
        for one in said:
            clash |= config.sampling == "agreed" and any(named.get(key, one[key]) != one[key] for key in one)
            named |= one
        if clash:
            raise UserError(
                "method.parts cannot be composed: their students take different inputs, times or sampling rules"
                " (for rules and times, method.sampling=first makes the first part's hold)."
            )
        return said[0] if config.sampling == "first" else named

    @property
    def needs_captions(self) -> bool:
        return any(part.method.needs_captions for part in self.parts)

    @property
    def needs_images(self) -> bool:
        return any(part.method.needs_images for part in self.parts)

    @property
    def trained_on(self) -> tuple[str, ...]:
        found: list[str] = []
        for number, part in enumerate(self.parts):
            with addressed(f"method.parts.{number}"):
                found += part.method.trained_on
        return tuple(found)

    @property
    def carried(self) -> tuple[str, ...]:
        return tuple(f"{part.scope}/{name}" for part in self.parts for name in part.method.carried)

    def pairs(self, schedule: Schedule) -> PairSettings | None:
        wanted = set()
        for number, part in enumerate(self.parts):
            with addressed(f"method.parts.{number}"):
                wanted |= {part.method.pairs(schedule)} - {None}
        if len(wanted) > 1:
            raise UserError("method.parts cannot be composed: two of them want different trajectory pairs.")
        return wanted.pop() if wanted else None

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
                prefix = f"{scope}/" if phase.name == "student" else ""
                terms = tuple((weight * w, _scope_loss(loss, scope, prefix)) for w, loss in phase.terms)
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

    def averaged(self, nets: Networks, average: Callable[[Tensor], Tensor]) -> None:
        for scope, _, part in self.parts:
            part.averaged(nets.scoped(scope), average)

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


def _scope_loss(loss: LossFn, scope: str, prefix: str) -> LossFn:
    """`loss` with its part's networks; what it logs beside the total gets `prefix` in front."""

    def scoped(nets: Networks, batch: Batch) -> Losses:
        losses = loss(nets.scoped(scope), batch)
        return {name if name == "total" else prefix + name: value for name, value in losses.items()}

    scoped.__name__ = f"{scope}.{term_name(loss)}"
    return scoped


def _parts(config: Any) -> list[tuple[str, float, type[Method], Any]]:
    """Scope, weight, class and configuration of each part, refused by their place in the recipe."""
    from stepdistill.methods import METHODS

    if len(config.parts) < 2:
        raise UserError(f"method.parts must list at least two methods to compose, got {len(config.parts)}.")
    parts: list[tuple[str, float, type[Method], Any]] = []
    for number, section in enumerate(config.parts):
        values = dict(section)
        where = f"method.parts.{number}"
        name, weight = values.pop("name", ""), values.pop("weight", 1.0)
        if (weight := configuration.coerce(weight, float, f"{where}.weight")) < 0:
            raise UserError(f"{where}.weight must be 0 or more, got {weight:g}.")
        cls = resolve(name, METHODS, "method", where=f"{where}.name")
        # One's own class by its name alone.
        scope = name.split(":")[-1]
        if scope in (taken for taken, *_ in parts):
            scope = f"{scope}{number}"
        parts.append((scope, weight, cls, configuration.build(cls.Config, values, where)))
    return parts
