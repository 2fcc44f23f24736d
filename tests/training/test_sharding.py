"""Networks in shards: two processes train what one trains, and a checkpoint goes on with any number of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from forks import two_processes
from models import family_of
from runs import GAN, checkpoint, same, sd, toy

from stepdistill.errors import UserError
from training import precompute, sharding
from training import run as running
from training.batches import Batches
from training.checkpoint import RunDirectory
from training.plan import _sizes
from training.recipe import Recipe

CONFIGURATIONS = sorted((Path(running.__file__).parent / "accelerate").glob("*.yaml"))
# Of any weight or average, all of which are float32 of the size of 1; an iteration moves them by a hundred times as much.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """The tiny pipeline with half of its UNet: what shards cost here goes by their number."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    config = {**pipeline.unet.config, **blocks, "block_out_channels": (16,)}
    torch.manual_seed(0)
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    path = tmp_path_factory.mktemp("pipelines") / "small"
    pipeline.save_pretrained(path)
    return path


def test_shards_train_what_one_process_trains_and_go_on_with_any_number(tmp_path, small_sd):
    """Those of the runs that begin with two also recompute their activations."""

    def make(name: str, *more: str) -> Any:
        settings = (
            "run.steps=2",
            "run.save_every=1",
            "run.keep=9",
            "optim.eps=1e-3",
            "run.check_teacher=false",
        )
        twice = ("student.gradient_checkpointing=true",) if name.startswith("two") else ()
        return sd(tmp_path / name, small_sd, *settings, *twice, *more)

    one, two = make("one"), make("two", "optim.micro_batch_size=1", "run.preview_every=2")
    running.run(one)
    again = make("two-two", "optim.micro_batch_size=1")
    ran = {"two": two, "one-two": make("one-two"), "two-two": again}
    begun = {"one-two": (tmp_path / "one", 1), "two-two": (tmp_path / "two", 1)}
    assert processes.in_two(ran, True, begun) == dict.fromkeys(ran, True)
    assert (tmp_path / "two" / "previews" / "0000002.png").is_file()
    assert (tmp_path / "two" / "student" / "model_index.json").is_file()
    resumed, whole = checkpoint(tmp_path / "two-two"), checkpoint(tmp_path / "two")
    assert same(resumed.tensors, whole.tensors) and same(resumed.optimizers, whole.optimizers)
    processes.from_step(tmp_path / "two", 1, tmp_path / "two-one")
    running.run(make("two-one"))
    end = checkpoint(tmp_path / "one")
    moved = processes.difference(end, checkpoint(tmp_path / "one", 1))
    assert moved > 100 * TOLERANCE
    for name in ("two", "one-two", "two-one"):
        assert processes.difference(end, checkpoint(tmp_path / name)) < TOLERANCE, name
    _each_process_wrote_its_own(tmp_path / "two", tmp_path / "one")
    _goes_on_from_the_last_whole_one(two)


def _each_process_wrote_its_own(two: Path, one: Path) -> None:
    shards, whole = two / "checkpoints" / "2", one / "checkpoints" / "2"
    for part in ("student", "student_ema", "student.optimizer", "fake_score"):
        sizes = [file.stat().st_size for file in (shards / part).iterdir()]
        assert len(sizes) == 2 and max(sizes) < 0.8 * (whole / f"{part}.safetensors").stat().st_size, part


def _goes_on_from_the_last_whole_one(recipe: Recipe) -> None:
    run = RunDirectory(recipe.run.out, 9)
    (shard,) = (run.checkpoints / "2" / "fake_score").glob("shard-00002-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run.begin(recipe) == 1 and "fake_score/shard-00002" in run.notes[0]
    run.lock.release()


@pytest.mark.slow
def test_many_methods_in_copies_and_in_shards(tmp_path):
    kept = json.loads(processes.TABLE.read_text())["rows"]
    rows = processes.measure(list(kept), tmp_path)
    for table in (rows, kept):
        for name, row in table.items():
            # Half precision rounds the products of half a batch otherwise than of a whole one: less than a step of it.
            rounded = "precision" in processes.CASES[name][2].get("run", {})
            within = row["movement"] if rounded else TOLERANCE
            for kind, value in row.items():
                if isinstance(value, bool):
                    assert value, (name, kind)
                elif kind == "movement":
                    assert value > 100 * TOLERANCE, name
                elif isinstance(value, float):
                    assert value < within, (name, kind)


@pytest.mark.slow
def test_every_family_in_shards(tmp_path, monkeypatch):
    """A pass of the student, of the teacher and through the fake score's taps, whatever a model calls of its blocks."""
    monkeypatch.setattr(precompute, "CACHE", tmp_path / "cache")
    recipes = {}
    for variant, (family, *_) in tiny.VARIANTS.items():
        monkeypatch.setitem(processes.CASES, variant, (variant, {**GAN, "student_every": 1}, {}))
        frames = ("family.frames=1",) if family == "wan" else ()
        made = tmp_path / variant / "run"
        recipes[variant] = processes.recipe(variant, made, "run.steps=1", "student.steps=[1]", *frames)
    assert processes.in_two(recipes, True) == dict.fromkeys(recipes, True)


def test_what_a_model_calls_of_a_block_is_a_unit_before_the_block():
    face = family_of("dit").teacher.network
    blocks = list(face.transformer.transformer_blocks)
    units = sharding.units(face)
    assert units == [blocks[0].norm1.emb, *blocks]
    # The plan counts it once.
    assert sum(_sizes(units)) == sum(p.nbytes for p in face.transformer.transformer_blocks.parameters())


def _launched(config: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """As `accelerate launch` reads a configuration: the environment it would make; the number of processes."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = launch_command_parser().parse_args(
        ["--config_file", str(config), "-m", "training.train", "recipe.yaml"]
    )
    given, _, _ = _validate_launch_command(given)
    if given.num_processes > 1:
        for name, value in prepare_multi_gpu_env(given).items():
            if name.startswith(("ACCELERATE_USE", "FSDP_", "PARALLELISM_CONFIG")):
                monkeypatch.setenv(name, value)
    return given.num_processes


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration_and_the_trainer_takes_it(config, monkeypatch):
    name = config.stem
    # Nothing is started, so it does not matter who is on the port.
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    assert _launched(config, monkeypatch) == int(re.match(r"\d*", name)[0] or 1)
    assert (os.environ.get("ACCELERATE_USE_FSDP") == "true") == name.endswith("fsdp")
    sharding.check_launch()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_told_what_to_use_instead(stage, tmp_path, monkeypatch):
    config = tmp_path / "zero.yaml"
    whole = {"zero_stage": stage, "offload_optimizer_device": "none", "zero3_init_flag": False}
    place = {"num_machines": 1, "machine_rank": 0, "num_processes": 8, "mixed_precision": "no"}
    kind = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED"}
    config.write_text(yaml.dump({**kind, **place, "deepspeed_config": whole}))
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(config)).deepspeed_config["zero_stage"] == stage
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"DeepSpeed.*8gpu_fsdp\.yaml.*ZeRO-3"):
        sharding.check_launch()


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version=1.*8gpu_fsdp"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params.*false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "student.gradient_checkpointing=true"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size.*dp_shard_size"),
    ],
)  # fmt: skip
def test_a_configuration_that_shards_otherwise_is_refused(named, says, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **named}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        sharding.check_launch()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("run.precision=fp16",), "run.precision=fp16.*bf16"),
        (("method.name=ladd", "method.r1=exact", "method.r1_weight=0.1"), "method.r1=exact.*finite"),
    ],
)
def test_what_of_a_recipe_cannot_be_sharded_is_refused(overrides, says, tmp_path):
    recipe = toy(
        tmp_path, *overrides, method={"name": "ladd"} if "ladd" in overrides[0] else {"name": "dmd2"}
    )
    with pytest.raises(UserError, match=says):
        sharding.check_sharded(recipe, recipe.new_method(), torch.nn.Identity())


def _reads_other_data(rank: int, recipe: Any) -> None:
    original = Batches.__init__

    def init(self: Batches, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.data = {"fingerprint": f"{rank}", "said": f"{40 + rank} examples"}

    Batches.__init__ = init
    running.run(recipe)


def test_processes_that_read_other_data_end_with_one_sentence(tmp_path):
    spawned = torch.multiprocessing
    says = "process 1 reads 41 examples, and process 0 reads 40|exit code 2"
    with pytest.raises((spawned.ProcessRaisedException, spawned.ProcessExitedException), match=says):
        two_processes(_reads_other_data, toy(tmp_path / "run"))
