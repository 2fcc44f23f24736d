"""What is interrupted goes on bit for bit, in a later stage as well; no half step is ever kept."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import LCM, TOY, assert_same_run, checkpoint, interrupt_in, metrics, sd, toy
from torch import Tensor

from stepdistill.config import apply_overrides
from stepdistill.errors import UserError
from stepdistill.methods.dmd2 import DMD2
from training import run as running
from training.checkpoint import RunDirectory
from training.recipe import Recipe, recipe_from
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.mark.parametrize("kind", ["toy-dmd2", "toy-compose", "sd-prompts", "sd-gan", "sd-lora"])
def test_an_interrupted_run_goes_on_bit_for_bit(kind, tmp_path, tiny_sd, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    (tmp_path / "prompts.txt").write_text("a small red circle on a black background\na large blue star\n" * 3)
    parts = [{"name": "dmd2", "gan_weight": 0.1, "student_every": 2}, {"name": "dmd2", "weight": 0.5}]
    few = ("run.steps=5", "run.log_every=1")
    make = {
        "toy-dmd2": lambda out: toy(out),
        "toy-compose": lambda out: toy(out, method={"name": "compose", "parts": parts}),
        "sd-prompts": lambda out: sd(
            out, tiny_sd, *few, method="dmd2", data={"name": "prompts", "path": str(tmp_path / "prompts.txt")}
        ),
        "sd-gan": lambda out: sd(out, tiny_sd, *few),
        "sd-lora": lambda out: sd(
            out, tiny_sd, *few, "student.lora.rank=2", method={"name": "vsd", "lora_rank": 2}
        ),
    }[kind]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    running.run(make(whole))
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            running.run(make(halves))
    # The step that was under way is finished and kept.
    assert RunDirectory(halves).steps() == [3]
    # Which a background shell may have set to be ignored.
    assert signal.getsignal(signal.SIGINT) is before
    running.run(make(halves))
    assert_same_run(whole, halves)
    assert len(metrics(whole)) >= 3
    if kind.startswith("sd"):
        for name in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json"):
            assert (whole / "student" / name).read_bytes() == (halves / "student" / name).read_bytes()


def test_half_a_step_is_never_saved(tmp_path, monkeypatch):
    """A second Ctrl-C stops at once; what is kept is the last whole step."""
    calls = []

    def critic(self: DMD2, nets: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, nets, batch)

    original = DMD2.critic_loss
    running.run(toy(tmp_path / "whole", "run.save_every=2"))
    with monkeypatch.context() as patch:
        patch.setattr(DMD2, "critic_loss", critic)
        with pytest.raises(KeyboardInterrupt):
            running.run(toy(tmp_path / "halves", "run.save_every=2"))
    assert RunDirectory(tmp_path / "halves").steps() == [2]
    running.run(toy(tmp_path / "halves", "run.save_every=2"))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_finished_run_says_so_and_fresh_starts_over(tmp_path, capsys):
    out = tmp_path / "run"
    running.run(toy(out))
    before = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    running.run(toy(out))
    assert "is finished at step 6; nothing to do (--fresh starts over)" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"run\.resume is false"):
        running.run(toy(out, "run.resume=false"))
    with pytest.raises(UserError, match=r"method\.student_every=2"):
        running.run(toy(out, "method.student_every=3"))
    running.run(toy(out, "method.student_every=3"), fresh=True)
    assert checkpoint(out).extra["counters"]["updates"] == {"student": 2, "fake_score": 6}
    # More steps go on from what there is.
    running.run(toy(out, "method.student_every=3", "run.steps=8"))
    assert RunDirectory(out).latest() == 8


STAGES = [
    {"method": LCM, "run": {"steps": 3}},
    {"method": TOY["method"], "run": {"steps": 4}, "optim": {"fake_score": {"lr": 2e-3}}},
]


def staged(out: Path, *overrides: str) -> Recipe:
    mapping = {key: value for key, value in TOY.items() if key != "method"}
    mapping["run"] = {"log_every": 1, "out": str(out)}
    return recipe_from(apply_overrides({**mapping, "stages": STAGES}, overrides))


@pytest.mark.parametrize("step", [1, 2, 4])
def test_stages_carry_the_student_over_and_resume(tmp_path, monkeypatch, step):
    """Interrupted in the first stage, at its end, and in the second, whose student takes no guidance."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    starts: list[dict[str, Tensor]] = []
    original = Trainer.fit

    def fit(self: Trainer) -> Any:
        starts.append({name: value.clone() for name, value in self.modules["student"].state_dict().items()})
        result = original(self)
        starts.append({name: value.clone() for name, value in result.state_dict().items()})
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        running.run(staged(whole))
    (_, left, taken, _) = starts
    assert set(left) - set(taken) == {"network.guidance.weight", "network.guidance.bias"}
    assert all(torch.equal(left[name], taken[name]) for name in taken)
    with monkeypatch.context() as patch:
        interrupt_in(patch, step)
        with pytest.raises(KeyboardInterrupt):
            running.run(staged(halves))
    assert RunDirectory(halves).latest() == step + 1
    running.run(staged(halves))
    assert_same_run(whole, halves)
    assert [line["step"] for line in metrics(whole)][:7] == [1, 2, 3, 4, 5, 6, 7]


def test_the_stage_before_may_not_change_its_length(tmp_path, monkeypatch):
    interrupt_in(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        running.run(staged(tmp_path / "run"))
    with pytest.raises(UserError, match="stage 1 began at step 3, and this recipe's begins at 5"):
        running.run(staged(tmp_path / "run", "stages.0.run.steps=5"))


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """A setting that did not exist then has its default: only another value is a change."""
    out = tmp_path / "run"
    running.run(toy(out, "run.steps=2"))
    written = out / "recipe.yaml"
    older = yaml.safe_load(written.read_text())
    for section, name in (
        ("student", "dropout"),
        ("student", "first_rho"),
        ("optim", "eps"),
        ("run", "patience"),
    ):
        del older[section][name]
    written.write_text(yaml.safe_dump(older))
    directory = RunDirectory(out)
    directory.check(toy(out, "run.steps=2"))
    assert directory.notes == []
    directory.check(toy(out, "run.steps=2", "optim.eps=1e-3"))
    (note,) = directory.notes
    assert "optim.eps was 1e-08 and is 0.001" in note
    with pytest.raises(UserError, match=r"a run with student\.first_rho=nothing, and this recipe has 7\.0"):
        directory.check(toy(out, "run.steps=2", "student.first_rho=7.0"))
    # A setting that there is no more: the file stands as it is, and says which.
    written.write_text(yaml.safe_dump(older | {"method": older["method"] | {"gone": 3}}))
    with pytest.raises(UserError, match=r"a run with method\.gone=3, and this recipe has nothing"):
        directory.check(toy(out, "run.steps=2"))
