"""Every recipe that is shipped is read, resolved and forecast; what is not here is stood in for by something tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_ins import STAND_INS, small

import stepdistill
from stepdistill.errors import UserError
from stepdistill.methods.assemble import assemble
from training.checkpoint import RunDirectory
from training.recipe import Recipe, load_recipe, recipe_from
from training.run import dry_run, run

pytestmark = pytest.mark.usefixtures("accelerator_state")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
STOOD_IN = [path for path in RECIPES if path.stem in STAND_INS]
# What nobody here has the memory for.
UNRUN = [path for path in STOOD_IN if not path.stem.startswith(("shapes_", "cifar10_", "transformer_"))]
FAST = ("sd15_lcm_lora", "sdxl_dmd2_4step")
ACCELERATE = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert recipe_from(recipe.mapping()) == recipe
    # Which git ignores.
    assert Path(recipe.run.out).parts[0] == "runs"
    for stage in recipe.stages():
        method = stage.new_method()
        for part in [part for *_, part in getattr(method, "parts", ())] or [method]:
            # A warm-up as long as its stage would leave out what comes after it: LADD's pure noise, sCM's tangent.
            assert getattr(part.config, "warmup", 0) < stage.run.steps / 2


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.fixture
def read_once(found, monkeypatch):
    """A teacher that many recipes name is read from disk once; a forecast changes none of its weights, and other tests read
    their own.
    """
    from diffusers import DiffusionPipeline

    read = DiffusionPipeline.from_pretrained

    def cached(*given, **settings):
        key = repr((given, settings))
        if key not in found:
            found[key] = read(*given, **settings)
        return found[key]

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", cached)


@pytest.mark.parametrize(
    "path",
    [
        # The methods are the toy's as well, whose networks have few operations to count.
        pytest.param(
            path, marks=pytest.mark.slow if path.stem.startswith(("scenes_", "transformer_")) else ()
        )
        for path in RECIPES
        if path not in STOOD_IN
    ],
    ids=lambda path: path.stem,
)
def test_a_shipped_recipe_can_be_forecast(path, read_once, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    fast = ["family.fit_steps=1"] if recipe.family.name == "toy" else []
    # Fewer captions to put into clusters.
    fast += ["data.size=2000"] if recipe.data.name == "scenes" else []
    # Which training.prune finds first.
    fast += ["method.intervals=[transformer_blocks.0-1]"] if path.stem == "transformer_prune" else []
    out = tmp_path / "run"
    said = dry_run(load_recipe(path, [f"run.out={out}", *fast]))
    assert not out.exists()
    resolved, _, forecast = said.partition("\n\n")
    assert recipe_from(yaml.safe_load(resolved)).run.out == str(out)
    for word in ("stage 0:", "data ", "student ", "trained", "activations"):
        assert word in forecast
    # A step of every phase could be counted.
    assert forecast.count("MiB at most, in phase") == len(recipe.stages())


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in FAST else pytest.mark.slow) for path in STOOD_IN],
    ids=lambda path: path.stem,
)
def test_a_recipe_runs_with_its_stand_in(path, short_runs, tmp_path):
    """Forecast, one iteration of every phase of every stage, export, and images out of what is exported."""
    recipe = small(path, tmp_path)
    forecast = dry_run(recipe)
    assert not Path(recipe.run.out).exists()
    assert forecast.count("MiB at most, in phase") == len(recipe.stages())
    run(recipe)
    directory = RunDirectory(recipe.run.out).student
    sampler = stepdistill.load(directory)
    told = "a red circle" if sampler.conditions == "prompt" else 0
    # As it would where a network or a VAE says what is not finite.
    assert sampler([told], [0]).float().std() > 1
    if recipe.student.lora:
        assert_every_adapter_is_read(recipe, directory)


def assert_every_adapter_is_read(recipe: Recipe, directory: Path) -> None:
    """By the stock pipeline; and no target of the recipe is one that no layer has."""
    family = recipe.family.make()
    student = assemble(recipe.stages()[0].new_method(), family, lora=recipe.student.lora).student
    named = {part for name in student.adapters for part in name.split("/")}
    assert set(recipe.student.lora.targets) <= named
    family.pipeline.load_lora_weights(directory / "lora")
    model = getattr(family.pipeline, family.face.inner)
    assert sum(bool(getattr(layer, "lora_A", ())) for layer in model.modules()) == len(student.adapters)


@pytest.mark.parametrize("path", UNRUN, ids=lambda path: path.stem)
def test_a_recipe_that_was_not_run_says_so(path):
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Not run here" in comment and "arXiv" in comment
    assert "accelerate launch -m training.train training/recipes/" + path.name in comment


def test_reward_goes_on_where_dmd2_ends(monkeypatch):
    """Its stages are written again because a recipe is one file; a run of the one is the other's beginning."""
    monkeypatch.chdir(ROOT)
    dmd2, reward = (
        load_recipe(ROOT / "training" / "recipes" / f"scenes_{name}.yaml", ["run.out=runs/x"]).stages()
        for name in ("dmd2", "reward")
    )
    assert reward[:-1] == dmd2 and reward[-1].method.name == "compose"


@pytest.mark.parametrize("name", ["toy_rcm", "scenes_rcm"])
def test_rcm_is_scm_without_what_it_lacks(name, monkeypatch):
    """arXiv 2510.08431: one tangent for all times, without sCM's prior and learned weight, and DMD's gradient beside it."""
    monkeypatch.chdir(ROOT)
    flow_map, matching = (
        part.method for part in load_recipe(ROOT / "training" / "recipes" / f"{name}.yaml").new_method().parts
    )
    assert (flow_map.config.prior, flow_map.config.learned_weight) == (False, False)
    assert (
        type(matching).__name__ == "DMD2" and flow_map.config.guidance_scale == matching.config.guidance_scale
    )


def test_recipes_are_there():
    assert {"toy_dmd2", "toy_lcm"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind, _, sharded = path.stem.partition("_")
    processes = {"cpu": 1, "2cpu": 2, "1gpu": 1, "8gpu": 8, "64gpu": 64}[kind]
    assert (str(config.distributed_type).rpartition(".")[2] == "FSDP") == (sharded == "fsdp")
    assert config.num_processes == processes
    assert bool(config.use_cpu) == path.stem.endswith("cpu")
    # The recipe's own setting decides.
    assert str(config.mixed_precision) == "no"


def test_a_recipe_of_a_run_runs_again(tmp_path, monkeypatch):
    """What a run directory keeps is a recipe in full."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(RECIPES[-1], [f"run.out={tmp_path / 'run'}"])
    directory = RunDirectory(recipe.run.out)
    directory.begin(recipe)
    assert load_recipe(directory.recipe) == recipe


def test_settings_that_nothing_implements_are_unknown(monkeypatch):
    monkeypatch.chdir(ROOT)
    for override in ("student.lora_rank=4", "run.compile=true"):
        with pytest.raises(UserError, match="unknown key"):
            load_recipe(RECIPES[-1], [override])
