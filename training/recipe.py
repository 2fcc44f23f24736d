"""A recipe: six sections of a YAML file as typed dataclasses, and optionally the stages a run goes through.

    family:  {name: sd, teacher: assets/teacher}
    student: {steps: [1, 2, 4]}
    method:  {name: dmd2, guidance_scale: 4.0}
    data:    {name: scenes}
    optim:   {lr: 1e-5, batch_size: 32, fake_score: {lr: 2e-5}}
    run:     {steps: 2000, out: runs/dmd2}

`family`, `method` and `data` name a class; the rest of the section is that class's own `Config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from stepdistill.config import UnknownKey, apply_overrides, build, closest, plain, read_yaml
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.methods import METHODS
from stepdistill.registry import resolve
from training.data import DATA

SECTIONS = ("family", "student", "method", "data", "optim", "run")


def _require(condition: bool, name: str, value: Any, must: str) -> None:
    if not condition:  # `build` puts the section before the field's name
        raise ValueError(f"{name} must {must}, got {value}.")


@dataclass(frozen=True)
class StudentConfig:
    steps: tuple[int, ...] = (1,)  # the step counts the student is made for
    init: str = "teacher"  # "teacher", "random", or a directory with a student
    ema: float = 0.999  # decay per student update; 0 = off
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        steps = self.steps
        good = len(steps) > 0 and min(steps) >= 1 and len(set(steps)) == len(steps)
        _require(good, "steps", list(steps), "be different whole numbers of at least 1")
        _require(bool(self.init), "init", "nothing", "be teacher, random or a directory")
        _require(0 <= self.ema < 1, "ema", self.ema, "be at least 0 and below 1")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4
    optimizer: Literal["adamw", "adam", "radam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # per network; 0 = no clipping
    batch_size: int = 64  # global: over all processes and accumulation passes
    micro_batch_size: int = 0  # per process and pass; 0 = batch_size // processes
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay_from: float = 0.0  # fraction of the run after which cosine and linear begin to fall
    warmup_steps: int = 0
    final_lr: float = 0.0  # fraction of lr reached at the end of the decay
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)  # written as optim.<network>.lr

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "lr", self.lr, "be above 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", list(self.betas), "be in [0, 1)")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "be 0 or more")
        _require(0 < self.eps < math.inf, "eps", self.eps, "be above 0")
        _require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "be 0 (no clipping) or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")
        micro, dividing = self.micro_batch_size, f"be 0 or divide batch_size={self.batch_size}"
        _require(
            micro >= 0 and (not micro or self.batch_size % micro == 0), "micro_batch_size", micro, dividing
        )
        _require(0 <= self.decay_from <= 1, "decay_from", self.decay_from, "be a fraction from 0 to 1")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "be 0 or more")
        _require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "be a fraction of lr from 0 to 1")
        typed = {}
        for name, overrides in self.networks.items():
            own = self.for_network(name)
            typed[name] = {key: getattr(own, key) for key in overrides}
        object.__setattr__(self, "networks", typed)

    def for_network(self, name: str) -> OptimConfig:
        """The settings of one network: the common ones with `optim.<name>.*` on top."""
        overrides = self.networks.get(name, {})
        for shared in ("batch_size", "micro_batch_size", "networks"):
            if shared in overrides:
                raise UserError(f"optim.{name}.{shared} cannot be set for one network; set optim.{shared}.")
        common = {key: getattr(self, key) for key in _field_names(OptimConfig) if key != "networks"}
        return build(OptimConfig, {**common, **overrides}, f"optim.{name}")

    def check_networks(self, names: Iterable[str]) -> None:
        """UserError when settings are given for a network that is not among `names`."""
        names = sorted(names)
        for given in self.networks:
            if given not in names:
                close = closest(given, [*names, *_field_names(OptimConfig)])
                hint = f"did you mean optim.{close}?" if close else f"this run trains {', '.join(names)}."
                raise UserError(f"optim.{given} names no network of this run; {hint}")

    def split(self, processes: int) -> tuple[int, int]:
        """(batch of one process in one pass, passes per step): together they make batch_size."""
        micro = self.micro_batch_size or self.batch_size // processes
        if micro == 0 or self.batch_size % (micro * processes):
            raise UserError(
                f"optim.batch_size={self.batch_size} must be a multiple of {max(micro, 1) * processes}"
                f" ({processes} processes x micro batch {max(micro, 1)})."
            )
        return micro, self.batch_size // (micro * processes)

    def lr_factor(self, step: int, total: int) -> float:
        """What `lr` is multiplied by at `step` of `total` (0-based): linear warm-up, then the schedule."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        start = self.decay_from * total
        if self.schedule == "constant" or step <= start:
            return warmup
        progress = min(1.0, (step - start) / max(total - start, 1))
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        return warmup * (self.final_lr + (1 - self.final_lr) * fall)

    def mapping(self) -> dict[str, Any]:
        """As it is written in a recipe: the networks' settings are sub-sections."""
        values = {name: getattr(self, name) for name in _field_names(OptimConfig) if name != "networks"}
        return {**values, **self.networks}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "optim") -> OptimConfig:
        """From a recipe's section, where every unknown key that holds a sub-section is a network's name."""
        mapping = _section(mapping, where)
        own = [name for name in _field_names(cls) if name != "networks"]
        networks = {
            key: part for key, part in mapping.items() if key not in own and isinstance(part, Mapping)
        }
        for key in mapping:
            if key not in own and key not in networks:
                raise UnknownKey(where, str(key), own)
        common = {key: value for key, value in mapping.items() if key in own}
        return build(cls, {**common, "networks": networks}, where)


@dataclass(frozen=True)
class RunConfig:
    steps: int
    out: str  # the run directory
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 10
    preview_every: int = 0  # 0 = no previews
    preview_count: int = 8
    save_every: int = 0  # 0 = only at the end
    keep: int = 2  # checkpoints kept, beside the best one
    metric_every: int = 0  # 0 = never measured during the run
    metric: str = "fd:scenes-v1"
    metric_samples: int = 500
    metric_reference: str = ""  # real images (Parquet or folder) for families that are told no prompts
    export: Literal["ema", "raw"] = "ema"  # which weights the student directory gets
    threads: int = 0  # torch CPU threads; 0 = leave as they are
    resume: bool = True

    def __post_init__(self) -> None:
        _require(bool(self.out.strip()), "out", "nothing", "name a directory")
        for name in ("steps", "log_every", "preview_count", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        for name in ("seed", "preview_every", "save_every", "metric_every", "threads"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "be 0 or more")
        _require(self.metric_samples >= 2, "metric_samples", self.metric_samples, "be at least 2")


@dataclass(frozen=True)
class Choice:
    """A section that names a class: the class and its own configuration."""

    name: str
    cls: type
    config: Any  # an instance of cls.Config

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """An instance: cls(config, ...)."""
        return self.cls(self.config, *args, **kwargs)

    def mapping(self) -> dict[str, Any]:
        return {"name": self.name, **plain(self.config)}


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe. With stages, the sections hold what they share, `stages()` what each one runs."""

    family: Choice
    student: StudentConfig
    method: Choice | None  # None only where every stage names its own; never None in what stages() returns
    data: Choice | None  # likewise
    optim: OptimConfig
    run: RunConfig  # with stages that all give run.steps and none in common, run.steps is their sum
    partials: tuple[dict[str, Any], ...] = ()  # the `stages:` list as written

    def stages(self) -> list[Recipe]:
        """The recipe of each stage, in order; [self] without stages."""
        if not self.partials:
            return [self]
        base = self.mapping()
        base.pop("stages")
        return [_from_mapping(_merged(base, partial)) for partial in self.partials]

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.run.steps for stage in self.stages())

    def mapping(self) -> dict[str, Any]:
        """As it is written in YAML; `recipe_from` reads it back to an equal recipe."""
        sections = {name: plain(getattr(self, name)) for name in SECTIONS if getattr(self, name) is not None}
        return {**sections, "stages": plain(self.partials)} if self.partials else sections


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with "section.key=value" overrides on top.

    Raises:
        UserError: anything that is missing, misspelt, of the wrong type or out of range, in one sentence.
    """
    return recipe_from(apply_overrides(read_yaml(path), overrides))


def recipe_from(mapping: Mapping[str, Any]) -> Recipe:
    """The recipe a mapping describes. Every stage is built once, so a mistake in the last is found now."""
    for key in mapping:
        if key not in (*SECTIONS, "stages"):
            raise UnknownKey("", str(key), [*SECTIONS, "stages"])
    base, partials = dict(mapping), mapping.get("stages")
    base.pop("stages", None)
    if partials is None:
        return _from_mapping(base)
    if not isinstance(partials, list) or not partials:
        raise UserError("stages: expected a list of sections, one entry per stage, or leave it out.")
    for i, partial in enumerate(partials):
        _check_stage(partial, f"stages.{i}")
    built = []
    for i, partial in enumerate(partials):
        try:
            built.append(_from_mapping(_merged(base, partial)))
        except UserError as error:
            raise UserError(f"stages.{i}: {error}") from None
    run = _section(base.get("run"), "run")
    if run.get("steps") is None:
        base["run"] = {**run, "steps": sum(stage.run.steps for stage in built)}
    return _from_mapping(base, partials=tuple(plain(partials)))


Difference = tuple[str, Any, Any]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """(dotted name, old value, new value) wherever two plain mappings differ; None is a missing key."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found


def _check_stage(partial: Any, where: str) -> None:
    if not isinstance(partial, Mapping):
        raise UserError(f"{where}: expected sections such as method and run, got {partial!r}.")
    for key in partial:
        if key not in ("student", "method", "data", "optim", "run"):
            raise UnknownKey(where, str(key), ["student", "method", "data", "optim", "run"])
    for key in _section(partial.get("run"), f"{where}.run"):
        if key != "steps":
            raise UserError(f"{where}.run.{key} is for the whole run; a stage can only set run.steps.")


def _merged(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with a stage's keys on top. A method or data source of another name starts from its defaults."""
    merged = dict(base)
    for name, section in partial.items():
        below, section = _section(base.get(name), name), _section(section, name)
        fresh = "name" in section and "name" in below and section["name"] != below["name"]
        merged[name] = dict(section) if fresh else _overlaid(below, section)
    return merged


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _overlaid(both[key], value) if nested else value
    return both


def _section(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, str) and where in ("family", "method", "data"):  # `data: scenes`
        return {"name": value}
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a section of `key: value` lines, got {value!r}.")
    return value or {}


def _from_mapping(mapping: Mapping[str, Any], partials: tuple[dict[str, Any], ...] = ()) -> Recipe:
    tables = {"family": FAMILIES, "method": METHODS, "data": DATA}
    try:
        chosen = {}
        for name, table in tables.items():
            left_to_stages = partials and name != "family" and name not in mapping
            chosen[name] = None if left_to_stages else _choice(mapping.get(name), table, name)
        student = build(StudentConfig, mapping.get("student"), "student")
        optim = OptimConfig.from_mapping(mapping.get("optim"))
        run = build(RunConfig, mapping.get("run"), "run")
    except UnknownKey as error:
        for name, cls in (("student", StudentConfig), ("optim", OptimConfig), ("run", RunConfig)):
            if error.section in SECTIONS and error.key in _field_names(cls):  # right key, wrong section
                given = f"{error.section}.{error.key}"
                raise UserError(f"unknown key {given}; did you mean {name}.{error.key}?") from None
        raise
    return Recipe(student=student, optim=optim, run=run, partials=partials, **chosen)


def _choice(section: Any, table: Mapping[str, str], what: str) -> Choice:
    values = dict(_section(section, what))
    name = values.pop("name", None)
    if not isinstance(name, str):
        given = "is missing" if name is None else f"is {name!r}"
        raise UserError(f"{what}.name {given}; choose one of {', '.join(sorted(table))}.")
    cls = resolve(name, table, what, where=f"{what}.name")
    if not hasattr(cls, "Config"):
        raise UserError(f"{what} {name!r}: the class {cls.__name__} has no Config dataclass.")
    return Choice(name, cls, build(cls.Config, values, what))


def _field_names(cls: type) -> list[str]:
    return [each.name for each in fields(cls)]
