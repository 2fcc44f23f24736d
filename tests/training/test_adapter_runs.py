"""Runs of adapters: what they go on from, and what they are refused."""

from __future__ import annotations

import pytest
import worlds
from models import family_of
from runs import checkpoint, sd

from stepdistill.errors import UserError
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from training import run as running
from training import train
from training.checkpoint import Checkpoint, RunDirectory

pytestmark = pytest.mark.usefixtures("short_runs")


def test_adapters_do_not_go_on_as_a_whole_network_nor_the_reverse(tmp_path, tiny_sd, capsys):
    method = {"name": "vsd", "lora_rank": 2}

    def recipe(rank: int, steps: int = 1):
        return sd(
            tmp_path / f"run{rank}", tiny_sd, f"run.steps={steps}", f"student.lora.rank={rank}", method=method
        )

    for rank, other in ((2, 0), (0, 2), (2, 1)):
        running.run(recipe(rank))
        directory = RunDirectory(tmp_path / f"run{rank}")
        kept = checkpoint(directory.path).tensors
        other_recipe = sd(directory.path, tiny_sd, "run.steps=2", f"student.lora.rank={other}", method=method)
        with pytest.raises(
            UserError, match=rf"holds a run with student\.lora\.rank={rank}, and this recipe has {other};"
        ):
            running.run(other_recipe)
        # Where somebody has changed the run's own recipe as well.
        directory.begin(recipe(rank, 2))
        text = directory.recipe.read_text()
        assert text.count(f"rank: {rank}\n") >= 1
        directory.recipe.write_text(text.replace(f"    rank: {rank}\n", f"    rank: {other}\n", 1))
        with pytest.raises(SystemExit) as ended:
            train.main([str(directory.recipe)])
        said = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and "the checkpoint of step 1 has" in said
        assert {(2, 0): "adapters for 'student', and this recipe makes a whole network",
                (0, 2): "a whole network for 'student', and this recipe makes adapters",
                (2, 1): "one of another size or rank"}[rank, other] in said  # fmt: skip
        assert checkpoint(directory.path).tensors.keys() == kept.keys()


def test_a_checkpoint_is_only_for_a_network_of_its_make():
    student = worlds.world("dmd2").nets.student
    state = student.state_dict()
    Checkpoint(3, {"student": state}, {}, {}).load_into("student", student)
    with pytest.raises(UserError, match="the checkpoint of step 3 has"):
        Checkpoint(3, {"student": dict(list(state.items())[1:])}, {}, {}).load_into("student", student)


def test_a_rank_larger_than_a_layer_is_refused_where_it_was_asked_for():
    family = family_of("sdxl")
    modules, adapted = dict(family.teacher.network.named_modules()), LoraConfig(1).over(family.teacher)
    least = min(min(modules[name].weight.shape) for name in adapted.ranks)
    says = rf"a LoRA of rank {least + 1} is larger than the layer unet\.\S+, whose smaller side is {least}; ask for a rank of"
    for settings, lora in (
        ({}, LoraConfig(least + 1)),
        ({"fake_score_lora": {"rank": least + 1}}, LoraConfig()),
    ):
        with pytest.raises(UserError, match=says):
            assemble(worlds.method("dmd2", **settings), family, lora=lora)
    assemble(worlds.method("dmd2"), family, lora=LoraConfig(least))
