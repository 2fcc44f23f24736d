"""A run reads what was computed before it, to the bit what it would have computed, and repeats or skips no data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import LCM, assert_same_run, checkpoint, sd, toy
from safetensors.torch import load_file

from stepdistill.config import dump
from stepdistill.families.sd import SD
from training import precompute
from training.batches import Batches
from training.encoded import Conditions
from training.recipe import Recipe
from training.run import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(precompute, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def written(tmp_path):
    def write(recipe: Recipe) -> str:
        path = tmp_path / f"{Path(recipe.run.out).name}.yaml"
        path.write_text(dump(recipe))
        return str(path)

    return write


@pytest.mark.parametrize("method", ["conditions alone", "images", "pairs"])
def test_a_run_is_the_same_to_the_bit_with_and_without_shards(
    tmp_path, tiny_sd, cache, written, method, monkeypatch
):
    chosen = {
        "conditions alone": {},
        "images": {"method": LCM},
        "pairs": {"method": {"name": "kd", "pair_count": 12, "pair_steps": 2}},
    }[method]
    # The test of the teacher comes before shards are read.
    settings = ("run.preview_every=3", "run.steps=3", "run.check_teacher=false")
    without, computing, reading = (
        sd(tmp_path / name, tiny_sd, f"run.precompute={how}", *settings, **chosen)
        for name, how in (("without", "never"), ("computing", "always"), ("reading", "auto"))
    )
    run(without)
    assert not list(cache.glob("conditions-*"))
    run(computing)
    precompute.main([written(reading)])
    encoded = []
    original = SD.encode
    monkeypatch.setattr(
        SD, "encode", lambda self, prompts: encoded.extend(prompts) or original(self, prompts)
    )
    run(reading)
    # The empty prompt, once.
    assert encoded == [""]
    assert_same_run(tmp_path / "without", tmp_path / "computing")
    assert_same_run(tmp_path / "without", tmp_path / "reading")
    previews = [
        (tmp_path / name / "previews" / "0000003.png").read_bytes() for name in ("without", "reading")
    ]
    assert previews[0] == previews[1]
    # Encoders that had left memory are in the student's directory.
    exported = [
        load_file(tmp_path / name / "student" / "text_encoder" / "model.safetensors")
        for name in ("without", "reading")
    ]
    assert exported[0].keys() == exported[1].keys() and all(
        torch.equal(exported[0][k], exported[1][k]) for k in exported[0]
    )


def test_conditions_are_encoded_once_where_it_pays(tmp_path, tiny_sd, cache):
    """24 captions: one step of two phases of 4 asks for fewer, six steps for more."""
    run(sd(tmp_path / "short", tiny_sd, "run.steps=1", "run.save_every=0"))
    assert not list(cache.glob("conditions-*"))
    run(sd(tmp_path / "long", tiny_sd, "run.steps=6"))
    assert len(list(cache.glob("conditions-*"))) == 1


def test_metric_prompts_are_encoded_too(tmp_path, tiny_sd, cache, monkeypatch):
    recipe = sd(
        tmp_path / "run", tiny_sd, "run.metric_every=2", "run.metric_samples=4", "run.precompute=always"
    )
    loaded = []
    monkeypatch.setattr(SD, "load_text", lambda self: loaded.append(self._dropped))
    monkeypatch.setattr(
        "training.monitor.measure",
        lambda run, family, sampler: (
            type("V", (), {"value": 1.0, "se": None, "better": "lower"})
            if sampler(precompute_prompts(run, family), range(4)) is not None
            else None
        ),
    )
    monkeypatch.setattr("training.trainer.ExportedStudent.write", lambda *given: None)
    run(recipe)
    assert len(list(cache.glob("conditions-*"))) == 2 and not any(loaded)


def precompute_prompts(run, family) -> list[str]:
    from training.measure import metric_prompts

    return metric_prompts(run, family)


def test_a_missing_shard_ends_a_run_in_one_sentence_and_precompute_makes_it_again(
    tmp_path, tiny_sd, cache, written, capsys
):
    from training import train

    recipe = written(sd(tmp_path / "run", tiny_sd, method=LCM))
    precompute.main([recipe])
    (shard,) = cache.glob("latents-*/000000.safetensors")
    shard.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main([recipe])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and said.startswith(
        f"error: the shard {shard} is missing; run `python -m training.precompute`"
    )
    precompute.main([recipe])
    train.main([recipe])
    assert checkpoint(tmp_path / "run").step == 6


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(tmp_path, tiny_sd, written):
    """In a process of its own, killed once the first shard is there; one row to a shard."""
    recipe = written(sd(tmp_path / "run", tiny_sd, "data.size=12"))
    code = "import sys, training.shards as s; s.SHARD_ROWS = 1; from training import precompute; precompute.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, recipe]
    place = {
        "cwd": tmp_path,
        "env": {**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    }
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **place)
    while process.poll() is None and not list(tmp_path.glob("cache/conditions-*/0*.safetensors")):
        pass
    process.kill()
    process.wait()
    first = min(tmp_path.glob("cache/conditions-*/0*.safetensors"))
    made = first.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True, **place)
    family = SD(SD.Config(teacher=str(tiny_sd)))
    from training.data.scenes import Scenes

    source = Scenes(Scenes.Config(size=12, resolution=16))
    conditions = Conditions(family, [source.all_captions()], tmp_path / "cache")
    assert conditions.complete and first.stat().st_mtime_ns == made
    assert len(list(tmp_path.glob("cache/conditions-*/0*.safetensors"))) == len(set(source.captions))


# ---------------------------------------------------------------------------------- what position and gradients count


def test_a_changed_batch_size_neither_repeats_nor_skips_an_example(tmp_path, monkeypatch):
    drawn: list[int] = []
    original = Batches._batch

    def batch(self, examples, *rest):
        drawn.extend(examples)
        return original(self, examples, *rest)

    monkeypatch.setattr(Batches, "_batch", batch)
    method = {"name": "cd"}
    data = {"name": "toy", "size": 100}
    run(toy(tmp_path, "run.steps=3", "optim.batch_size=10", method=method, data=data))
    run(toy(tmp_path, "run.steps=5", "optim.batch_size=35", method=method, data=data))
    assert len(drawn) == 100 and sorted(drawn) == list(range(100))


def test_accumulation_in_the_environment_changes_nothing(tmp_path, monkeypatch, accelerator_state):
    run(toy(tmp_path / "plain", "run.steps=2"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(toy(tmp_path / "set", "run.steps=2"))
    assert_same_run(tmp_path / "plain", tmp_path / "set")
