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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config import UnknownKey, apply_overrides, build, plain
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.base import Family
from stepdistill.methods import EVERY_METHOD
from stepdistill.methods.base import Method
from stepdistill.registry import resolve
from stepdistill.sampling import Sampling
from stepdistill.yaml_files import read_yaml
from training.data import DATA
from training.sections import OptimConfig, RunConfig, StudentConfig, as_section, field_names

SECTIONS = ("family", "student", "method", "data", "optim", "run")


@dataclass(frozen=True)
class Choice:
    """A section that names a class: the class and its own configuration.

    Attributes:
        config: an instance of cls.Config.
    """

    name: str
    cls: type
    config: Any

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """An instance: cls(config, ...)."""
        return self.cls(self.config, *args, **kwargs)

    def mapping(self) -> dict[str, Any]:
        """As it is written in a recipe."""
        return {"name": self.name, **plain(self.config)}


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe. With stages, the sections hold what they share, `stages()` what each one runs.

    Attributes:
        method, data: None only where every stage names its own; never None in what `stages()` returns.
        run: with stages that all give run.steps and none in common, run.steps is their sum.
        partials: the `stages:` list as written.
        sampling: how the student of a stage is sampled; None only where `method` is.
    """

    family: Choice
    student: StudentConfig
    method: Choice | None
    data: Choice | None
    optim: OptimConfig
    run: RunConfig
    partials: tuple[dict[str, Any], ...] = ()
    sampling: Sampling | None = None

    def stages(self) -> list[Recipe]:
        """The recipe of each stage, in order; [self] without stages."""
        if not self.partials:
            return [self]
        base = self.mapping()
        base.pop("stages")
        return _staged(base, self.partials)

    def new_family(self) -> Family:
        """The family, its teacher read.

        Raises:
            UserError: it cannot be; what is wrong with a file says whose it is, family.teacher.
        """
        try:
            return self.family.make()
        except UserError as error:
            teacher = getattr(self.family.config, "teacher", "")
            # What is wrong with another file, a LoRA's say, names that one.
            if not teacher or not str(error).startswith(str(Path(teacher))):
                raise
            raise UserError(f"family.teacher={teacher}: {error}") from None

    def new_method(self) -> Method:
        """The stage's method, for a student sampled as `sampling` says."""
        return self.method.make(self.sampling)

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
    mapping = apply_overrides(read_yaml(path), overrides)
    recipe = recipe_from(mapping)
    for override in overrides if recipe.partials else ():
        _refuse_unheard(override.partition("=")[0].strip(), recipe.partials)
    return recipe


def _refuse_unheard(key: str, stages: Sequence[Mapping[str, Any]]) -> None:
    """UserError for an override of what every stage sets for itself. `run.steps` is how far the run goes in all."""
    if key == "run.steps":
        return

    def sets(stage: Any) -> bool:
        stage = {name: as_section(section, name) for name, section in stage.items()}
        for part in key.split("."):
            if not isinstance(stage, Mapping) or part not in stage:
                return False
            stage = stage[part]
        return True

    if all(map(sets, stages)):
        raise UserError(
            f"{key} changes nothing, as every stage sets its own; override stages.0.{key} and so on."
        )


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
    built = _staged(base, partials)
    run = as_section(base.get("run"), "run")
    if run.get("steps") is None:
        base["run"] = {**run, "steps": sum(stage.run.steps for stage in built)}
    return _from_mapping(base, partials=tuple(plain(partials)))


def _staged(base: Mapping[str, Any], partials: Sequence[Mapping[str, Any]]) -> list[Recipe]:
    """The recipe of each stage. A student's sampling goes on from stage to stage; that of a many-step model, which
    students are yet to be made of, does not.
    """
    built: list[Recipe] = []
    inherited: dict[str, Any] = {}
    for i, partial in enumerate(partials):
        try:
            built.append(_from_mapping(_merged(base, partial), inherited=inherited))
            _refuse_unsampled(partial, [built[-1]])
        except UnknownKey as error:
            if error.section == "method" and (meant := _heard(error.key, base, partials)):
                raise UserError(
                    f"stages.{i}: unknown key method.{error.key}, which is for another stage; give it as {meant}."
                ) from None
            raise UserError(f"stages.{i}: {error}") from None
        except UserError as error:
            raise UserError(f"stages.{i}: {error}") from None
        inherited = {} if built[-1].method.cls.many_steps else built[-1].sampling.inherited()
    _refuse_unsampled(base, built)
    return built


def _heard(key: str, base: Mapping[str, Any], partials: Sequence[Mapping[str, Any]]) -> str:
    """The stages whose methods have a setting of that name, as it is given for them."""
    names = [as_section(_merged(base, partial).get("method"), "method").get("name") for partial in partials]
    classes = [resolve(name, EVERY_METHOD, "method") if name in EVERY_METHOD else None for name in names]
    return " and ".join(
        f"stages.{i}.method.{key}" for i, cls in enumerate(classes) if cls and key in field_names(cls.Config)
    )


def _check_stage(partial: Any, where: str) -> None:
    if not isinstance(partial, Mapping):
        raise UserError(f"{where}: expected sections such as method and run, got {partial!r}.")
    for key in partial:
        if key not in ("student", "method", "data", "optim", "run"):
            raise UnknownKey(where, str(key), ["student", "method", "data", "optim", "run"])
    for key in as_section(partial.get("run"), f"{where}.run"):
        if key != "steps":
            raise UserError(f"{where}.run.{key} is for the whole run; a stage can only set run.steps.")


def _merged(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with a stage's keys on top. A method or data source of another name starts from its defaults."""
    merged = dict(base)
    for name, section in partial.items():
        below, section = as_section(base.get(name), name), as_section(section, name)
        fresh = "name" in section and "name" in below and section["name"] != below["name"]
        merged[name] = dict(section) if fresh else _overlaid(below, section)
    return merged


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _overlaid(both[key], value) if nested else value
    return both


def _from_mapping(
    mapping: Mapping[str, Any],
    partials: tuple[dict[str, Any], ...] = (),
    inherited: Mapping[str, Any] | None = None,
) -> Recipe:
    tables = {"family": FAMILIES, "method": EVERY_METHOD, "data": DATA}
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
            # The right key in the wrong section.
            if error.section in SECTIONS and error.key in field_names(cls):
                given = f"{error.section}.{error.key}"
                raise UserError(f"unknown key {given}; did you mean {name}.{error.key}?") from None
        raise
    method: Choice | None = chosen["method"]
    sampling = None
    if method is not None:
        layers = (inherited or {}, method.cls.sampled(method.config), student.sampled())
        sampling = Sampling.of(student.steps, *layers)
    recipe = Recipe(student=student, optim=optim, run=run, partials=partials, sampling=sampling, **chosen)
    if not partials and inherited is None:
        _refuse_unsampled(mapping, [recipe])
    return recipe


def _refuse_unsampled(mapping: Mapping[str, Any], stages: Sequence[Recipe]) -> None:
    """Settings of sampling that no stage's rule looks at would change nothing and say nothing."""
    for name, value in as_section(mapping.get("student"), "student").items():
        if value and not any(stage.sampling.hears(name) for stage in stages):
            rules = " and ".join(sorted({stage.sampling.rule for stage in stages}))
            raise UserError(
                f"student.{name}={value} changes nothing, since the student is sampled by student.rule={rules}, which"
                " does not look at it; leave it out."
            )


def _choice(section: Any, table: Mapping[str, str], what: str) -> Choice:
    values = dict(as_section(section, what))
    name = values.pop("name", None)
    if not isinstance(name, str):
        given = "is missing" if name is None else f"is {name!r}"
        raise UserError(f"{what}.name {given}; choose one of {', '.join(sorted(table))}.")
    cls = resolve(name, table, what, where=f"{what}.name")
    if not hasattr(cls, "Config"):
        raise UserError(f"{what} {name!r}: the class {cls.__name__} has no Config dataclass.")
    return Choice(name, cls, build(cls.Config, values, what))
