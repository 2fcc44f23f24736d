"""Runs of adapters: what they go on from, and what they are refused."""

from __future__ import annotations

import pytest
import worlds
from models import family_of
from runs import sd
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from training import run as running
from training import train
from training.checkpoint import Checkpoint, RunDirectory

pytestmark = pytest.mark.usefixtures("short_runs")


def test_adapters_do_not_go_on_as_a_whole_network(tmp_path, tiny_sd, capsys):
    def recipe(rank: int, steps: int = 1):
        method = {"name": "vsd", "lora_rank": 2}
        return sd(tmp_path, tiny_sd, f"run.steps={steps}", f"student.lora.rank={rank}", method=method)

    running.run(recipe(2))
    directory = RunDirectory(tmp_path)
    kept = (directory.checkpoints / "1/student.safetensors").read_bytes()
    says = r"holds a run with student\.lora\.rank=2, and this recipe has 0;"
    for asked in (recipe(0, 2), recipe(0)):
        with pytest.raises(UserError, match=says):
            running.run(asked)
    # Where somebody has changed the run's own recipe as well.
    directory.begin(recipe(2, 2))
    directory.lock.release()
    text = directory.recipe.read_text()
    assert "    rank: 2\n" in text
    directory.recipe.write_text(text.replace("    rank: 2\n", "    rank: 0\n", 1))
    with pytest.raises(SystemExit) as ended:
        train.main([str(directory.recipe)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert said.startswith(
        "error: the checkpoint of step 1 has adapters for 'student', and this recipe makes a whole"
    )
    assert (directory.checkpoints / "1/student.safetensors").read_bytes() == kept


def test_a_checkpoint_is_only_for_a_network_of_its_make(tiny_sd, tmp_path):
    family = SD(SD.Config(teacher=str(tiny_sd)))
    made = {
        rank: assemble(worlds.method("dmd2"), family, lora=LoraConfig(rank)).student for rank in (0, 1, 2)
    }
    states = {rank: student.state_dict() for rank, student in made.items()}

    def written(state):
        save_file(state, tmp_path / "student.safetensors")
        return Checkpoint(tmp_path, 3, ("student",), (), {})

    for held, wanted, says in (
        (2, 0, "has adapters for 'student', and this recipe makes a whole network"),
        (0, 2, "has a whole network for 'student', and this recipe makes adapters"),
        (1, 2, "has one of another size or rank for 'student'"),
    ):
        with pytest.raises(UserError, match=f"the checkpoint of step 3 {says}"):
            written(states[held]).load_into("student", made[wanted])
        written(states[held]).load_into("student", made[held])
    with pytest.raises(UserError, match="of another size"):
        written(dict(list(states[0].items())[1:])).load_into("student", made[0])


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
