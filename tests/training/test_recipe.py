"""A recipe: sections, networks' settings, batches, rates, stages, and what is wrong with one in a sentence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepdistill.config import apply_overrides, dump
from stepdistill.errors import UserError
from stepdistill.families import base as families
from stepdistill.methods import base as methods
from training.identity import changes
from training.recipe import OptimConfig, load_recipe, recipe_from

pytestmark = pytest.mark.usefixtures("own_code")


class Method(methods.Method):
    @dataclass(frozen=True)
    class Config:
        guidance_scale: float = 1.0
        every: int = 5


class OtherMethod(methods.Method):
    @dataclass(frozen=True)
    class Config:
        alpha: float = 1.0


class Family(families.Family):
    @dataclass(frozen=True)
    class Config:
        teacher: str = "assets/teacher"


HERE = f"{__name__}:"
BASE: dict[str, Any] = {
    "family": {"name": f"{HERE}Family"},
    "student": {"steps": [1, 4]},
    "method": {"name": f"{HERE}Method", "guidance_scale": "4"},
    "data": {"name": "toy", "size": 100},
    "optim": {"lr": "1e-4", "fake_score": {"lr": "2e-4", "betas": [0, 0.99]}},
    "run": {"steps": "1e3", "out": "runs/x", "precision": False},
}


def test_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump(BASE))
    recipe = load_recipe(path, ["optim.lr=1e-6", "method.every=2", "student.init=random"])
    assert recipe.optim.lr == 1e-6 and recipe.method.config == Method.Config(4.0, 2)
    assert recipe.run.steps == 1000 and recipe.run.precision == "no" and recipe.student.steps == (1, 4)
    assert recipe.data.make().size == 100
    assert recipe.stages() == [recipe] and recipe.total_steps == 1000
    assert recipe_from(yaml.safe_load(dump(recipe))) == recipe


def test_optim_of_one_network() -> None:
    optim = recipe_from(BASE).optim
    fake = optim.for_network("fake_score")
    assert (fake.lr, fake.betas, fake.eps) == (2e-4, (0.0, 0.99), optim.eps)
    assert optim.for_network("student").lr == 1e-4
    assert optim.for_network("fake_score_1") == fake != optim.for_network("student_1")
    own = recipe_from(apply_overrides(BASE, ["optim.fake_score_1.betas=[0, 0.5]"])).optim
    second = own.for_network("fake_score_1")
    assert (second.lr, second.betas) == (2e-4, (0.0, 0.5))
    optim.check_networks(["student", "fake_score"])
    with pytest.raises(
        UserError, match=r"optim\.fake_score names no network of this run; this run trains student\."
    ):
        optim.check_networks(["student"])
    typo = recipe_from(apply_overrides(BASE, ["optim.fake_scor.lr=1"])).optim
    with pytest.raises(
        UserError, match=r"optim\.fake_scor names no network .* did you mean optim\.fake_score\?"
    ):
        typo.check_networks(["student", "fake_score"])


@pytest.mark.parametrize(
    ("processes", "micro", "expected"), [(1, 0, (64, 1)), (2, 0, (32, 1)), (2, 8, (8, 4))]
)
def test_batch_is_split_over_processes_and_passes(
    processes: int, micro: int, expected: tuple[int, int]
) -> None:
    assert OptimConfig(micro_batch_size=micro).split(processes) == expected


def test_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"optim\.batch_size=64 must be a multiple of 63 \(3 processes x micro batch 21\)"
    ):
        OptimConfig().split(3)
    with pytest.raises(UserError, match="must be a multiple of 8"):
        OptimConfig(batch_size=4).split(8)


def test_lr_schedule() -> None:
    assert [OptimConfig().lr_factor(step, 10) for step in (0, 9)] == [1.0, 1.0]
    warm = OptimConfig(warmup_steps=3)
    assert [warm.lr_factor(step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = OptimConfig(schedule="linear", decay_from=0.5, final_lr=0.1)
    assert linear.lr_factor(50, 100) == 1.0
    assert linear.lr_factor(75, 100) == pytest.approx(0.55)
    assert linear.lr_factor(100, 100) == pytest.approx(0.1)
    cosine = OptimConfig(schedule="cosine")
    factors = [cosine.lr_factor(step, 100) for step in range(101)]
    assert factors[50] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(factors))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("optim.lr=abc", "optim.lr: expected a number, got 'abc'"),
        ("optim.lr=0", "optim.lr must be above 0, got 0.0."),
        (
            "optim.betas=[0.9,1]",
            "optim.betas must be two numbers in [0, 1) with optimizer=adamw, got [0.9, 1.0].",
        ),
        ("optim.micro_batch_size=7", "optim.micro_batch_size must be 0 or divide batch_size=64, got 7."),
        ("optim.fake_score.lr=-1", "optim.fake_score.lr must be above 0, got -1.0."),
        ("optim.fake_score.rl=1", "unknown key optim.fake_score.rl"),
        ("optim.fake_score.batch_size=8", "optim.fake_score.batch_size cannot be set for one network"),
        ("run.batch_size=8", "unknown key run.batch_size; did you mean optim.batch_size?"),
        ("run.steps=0", "run.steps must be at least 1, got 0."),
        ("run.out=", "run.out: expected text, got nothing"),
        ("run.precision=half", "run.precision: expected one of no, bf16, fp16; got 'half'"),
        ("student.steps=[1,1]", "student.steps must be different whole numbers of at least 1, got [1, 1]."),
        ("student.ema=1", "student.ema must be at least 0 and below 1, got 1.0."),
        ("method.guidence_scale=2", "unknown key method.guidence_scale; did you mean method.guidance_scale?"),
        ("method.name=", "method.name is missing; choose one of"),
        ("data.name=scene", "unknown data 'scene'. Did you mean 'scenes'?"),
        ("data.partition=3/2", "data.partition must look like 1/2 (first of two), got '3/2'."),
        ("famly.name=x", "unknown key famly; did you mean family?"),
        ("optim=3", "optim: expected a section"),
        ("stages=3", "stages: expected a list of sections"),
    ],
)
def test_recipe_errors(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_from(apply_overrides(BASE, [override]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_required_fields() -> None:
    with pytest.raises(UserError, match=r"run\.steps is missing"):
        recipe_from({**BASE, "run": {"out": "x"}})
    with pytest.raises(UserError, match=r"data\.path is missing"):
        recipe_from({**BASE, "data": "folder"})
    with pytest.raises(UserError, match=r"family\.name is missing; choose one of"):
        recipe_from({key: value for key, value in BASE.items() if key != "family"})


def staged() -> dict[str, Any]:
    base = {key: value for key, value in BASE.items() if key != "method"}
    base["run"] = {"out": "runs/x"}
    first = {"method": f"{HERE}Method", "run": {"steps": 3}, "optim": {"fake_score": {"lr": 1e-3}}}
    second = {
        "method": {"name": f"{HERE}OtherMethod", "alpha": 2},
        "run": {"steps": 4},
        "student": {"ema": 0.5},
    }
    return {**base, "stages": [first, second]}


def test_an_override_that_no_stage_hears_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(staged()))
    says = "method.name changes nothing, as every stage sets its own; override stages.0.method.name"
    with pytest.raises(UserError, match=says):
        load_recipe(path, ["method.name=lcm"])
    # The first stage sets the rate itself, the second has what is asked for.
    recipe = load_recipe(path, ["run.steps=5", "optim.fake_score.lr=1e-5"])
    assert [stage.optim.networks["fake_score"]["lr"] for stage in recipe.stages()] == [1e-3, 1e-5]


def test_a_setting_that_the_rule_of_sampling_ignores_is_refused():
    """The ODE's grid begins at the schedule's end, whatever is asked for."""
    base = {"family": {"name": "toy"}, "data": {"name": "toy"}}

    def made(name: str, **student: Any) -> Any:
        section = {"method": {"name": name}, "student": {"steps": [1, 2], **student}}
        return recipe_from(base | section | {"run": {"steps": 1, "out": "run"}})

    def staged(every: dict[str, Any], **first: Any) -> Any:
        stages = [{"method": {"name": name}, "run": {"steps": 1}} for name in ("cdm", "dmd2")]
        stages[0] |= first
        return recipe_from(base | {"student": every, "run": {"out": "run"}, "stages": stages})

    says = r"student\.first_rho=1\.0 changes nothing, .* student\.rule=ode"
    with pytest.raises(UserError, match=says):
        made("cdm", first_rho=1.0)
    with pytest.raises(UserError, match=r"stages\.0: " + says):
        staged({}, student={"first_rho": 1.0})
    with pytest.raises(UserError, match=r"student\.eta=0\.3 changes nothing, .* student\.rule=renoise"):
        made("dmd2", eta=0.3)
    assert made("dmd2", first_rho=1.0).sampling.first_rho == 1.0
    assert made("dmd2", rule="tcd", eta=0.3).sampling.eta == 0.3
    with pytest.raises(
        UserError, match=r"^student\.eta=0\.3 changes nothing, .* student\.rule=ode and renoise"
    ):
        staged({"eta": 0.3})
    # What is said for all stages is for those that look at it.
    assert staged({"first_rho": 1.0}).stages()[1].sampling.first_rho == 1.0


def test_stages_are_laid_over_the_base() -> None:
    recipe = recipe_from(staged())
    one, two = recipe.stages()
    assert one.method.config == Method.Config() and two.method.config == OtherMethod.Config(2.0)
    assert (one.run.steps, two.run.steps, recipe.total_steps, recipe.run.steps) == (3, 4, 7, 7)
    assert one.student.ema == 0.999 and two.student.ema == 0.5 and two.student.steps == (1, 4)
    assert one.optim.networks["fake_score"] == {"lr": 1e-3, "betas": (0.0, 0.99)}
    assert two.optim.networks["fake_score"]["lr"] == 2e-4
    assert one.stages() == [one]
    assert recipe_from(yaml.safe_load(dump(recipe))) == recipe
    assert recipe_from(apply_overrides(staged(), ["stages.1.run.steps=9"])).total_steps == 12
    with_method = {**staged(), "method": BASE["method"]}
    inherited = recipe_from(with_method).stages()
    # The same method: the base's values hold.
    assert inherited[0].method.config.guidance_scale == 4.0
    # Another one: its own defaults.
    assert inherited[1].method.config == OtherMethod.Config(2.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.run.out=x", "stages.0.run.out is for the whole run; a stage can only set run.steps."),
        ("stages.0.family.name=x", "unknown key stages.0.family; known are"),
        ("stages.1.method.foo=1", "stages.1: unknown key method.foo"),
        ("stages.1.method=", "stages.1: method.name is missing"),
        ("stages.1.run=", "stages.1: run.steps is missing"),
    ],
)
def test_stage_errors(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_from(apply_overrides(staged(), [override]))
    assert message in str(error.value)


def test_changes() -> None:
    """By dotted names: what may not change within a run, and what may; stages may be added, and none may go."""
    # A method may have a setting of that name.
    ect = {"name": "ect", "stages": 4}
    assert changes({"method": ect}, {"method": ect | {"stages": 5}}) == ([("method.stages", 4, 5)], [])
    old = {"student": {"ema": 0.5}, "optim": {"lr": 1, "score": {"lr": 2}}, "stages": [{"run": {"steps": 3}}]}
    new = {"student": {"ema": 0.9}, "optim": {"lr": 1}, "data": {"name": "toy"}, "run": {"new": 1}}
    assert changes(old, new | {"stages": [*old["stages"], {"method": {"name": "lcm"}}]}) == (
        [("student.ema", 0.5, 0.9)],
        [
            ("optim.score.lr", 2, None),
            ("data.name", None, "toy"),
            ("run.new", None, 1),
            ("stages.1", None, "a stage"),
        ],
    )
    fixed, _ = changes(old, new)
    assert ("stages.0", "a stage", None) in fixed
    assert changes(BASE, dict(BASE)) == ([], [])


def test_a_setting_of_another_stages_method_is_named_with_that_stage() -> None:
    path = Path(__file__).parents[2] / "training" / "recipes" / "scenes_anyflow.yaml"
    says = r"^stages\.0: unknown key method\.normalise, .* give it as stages\.1\.method\.normalise\.$"
    with pytest.raises(UserError, match=says):
        load_recipe(path, ["method.normalise=true"])
    with pytest.raises(UserError, match=r"^stages\.0: unknown key method\.nobodys; known are"):
        load_recipe(path, ["method.nobodys=1"])
