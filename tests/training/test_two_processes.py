"""Two processes train what one trains, stop together, and end together."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forks import two_processes
from runs import checkpoint, metrics, same, sd, toy
from safetensors.torch import load_file, save_file

from training import run as running
from training.checkpoint import RunDirectory
from training.recipe import Recipe
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_runs")


def train(rank: int, recipe: Recipe, folder: Path) -> None:
    original = Trainer.fit

    def fit(self: Trainer) -> Any:
        assert self.accelerator.num_processes == 2
        try:
            return original(self)
        finally:
            for name, module in self.modules.items():
                save_file(module.state_dict(), folder / f"{name}-{rank}.safetensors")

    Trainer.fit = fit
    running.run(recipe)


def train_in_two(recipe: Recipe, folder: Path) -> None:
    folder.mkdir()
    two_processes(train, recipe, folder)


@pytest.mark.parametrize("kind", ["toy", "sd-gan"])
def test_two_processes_train_what_one_trains(kind, tmp_path, tiny_sd):
    """Where a gradient is almost nothing, Adam makes rounding count in full: hence the large eps."""
    settings = ("run.steps=4", "run.log_every=1", "optim.eps=1e-3", "optim.max_grad_norm=1")

    def make(name: str, *more: str) -> Recipe:
        if kind == "toy":
            return toy(tmp_path / name, *settings, *more)
        return sd(tmp_path / name, tiny_sd, *settings, *more)

    train_in_two(make("two", "optim.micro_batch_size=2", "run.preview_every=2"), tmp_path / "ranks")
    running.run(make("one"))
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    names = {"toy": {"student", "fake_score"}, "sd-gan": {"student", "fake_score", "discriminator"}}[kind]
    assert set(one.tensors) == names | {"student_ema"}
    for name, state in one.tensors.items():
        for key, value in state.items():
            assert torch.allclose(value.float(), two.tensors[name][key].float(), rtol=0, atol=1e-5), (
                name,
                key,
            )
    for name in names:
        first, second = (load_file(tmp_path / "ranks" / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert same(first, second), name
    # The one that draws previews looks at their samples as well.
    logs = (
        [line for line in metrics(tmp_path / each) if "samples/std_ratio" not in line]
        for each in ("one", "two")
    )
    for a, b in zip(*logs, strict=True):
        losses = {key for key in a if key.endswith(("/total", "/denoising", "/gan", "_student"))}
        assert losses or any(name.startswith("metric/") for name in a)
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in losses), (a, b)


def test_what_the_first_process_refuses_ends_all(tmp_path):
    """The main process alone looks at the directory; the other must neither wait for it nor train."""
    (tmp_path / "file").touch()
    # Whichever ends first is reported: one says the sentence, the other leaves with 2.
    says = "is a file; name a directory|exit code 2"
    spawned = torch.multiprocessing
    with pytest.raises((spawned.ProcessRaisedException, spawned.ProcessExitedException), match=says):
        train_in_two(toy(tmp_path / "file"), tmp_path / "ranks")


def test_two_processes_stop_after_the_same_step_and_measure(tmp_path, monkeypatch):
    """One process alone gets the signal, and one alone measures; neither may leave the other waiting."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    measuring = ("run.metric=sw1", "run.metric_every=2", "run.save_every=3")
    train_in_two(toy(whole, *measuring), tmp_path / "ranks")
    with monkeypatch.context() as patch:
        original = Trainer.train_step

        def train_step(self: Trainer) -> None:
            if self.state.step == 2 and self.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self)

        patch.setattr(Trainer, "train_step", train_step)
        # torch takes KeyboardInterrupt for an end.
        train_in_two(toy(halves, *measuring), tmp_path / "ranks2")
    assert RunDirectory(halves).latest() == 3
    train_in_two(toy(halves, *measuring), tmp_path / "ranks3")
    assert same(checkpoint(whole).tensors, checkpoint(halves).tensors)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sd3", "qwen-image"])
def test_an_encoder_that_ends_in_a_joint_block_is_trained_in_two_processes(variant, tmp_path):
    """What its last block makes of the text nobody hears: no gradient arrives there, and none is waited for."""
    recipe = toy(
        tmp_path / "run", "run.steps=3", "run.precompute=never",
        family={"name": tiny.VARIANTS[variant][0], "teacher": str(tiny.directory(variant)), "resolution": [32]},
        student={"steps": [2], "ema": 0.5}, method={"name": "lightning"},
        data={"name": "scenes", "size": 24, "resolution": 32}, optim={"lr": 1e-3, "batch_size": 4},
    )  # fmt: skip
    train_in_two(recipe, tmp_path / "ranks")
    first, second = (load_file(tmp_path / "ranks" / f"encoder-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    begun = recipe.family.make().teacher.encoder().state_dict()
    assert not same({name: begun[name] for name in first}, first)
