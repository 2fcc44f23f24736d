"""One step: what is split adds up, what is frozen stays, and what is not finite ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from runs import GAN, checkpoint, metrics, same, sd, toy
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.methods.base import Batch, Method, Networks, Phase
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.ladd import LADD
from training import run as running
from training.batches import Batches
from training.checkpoint import Checkpoint
from training.recipe import Recipe
from training.state import TrainState
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_runs")


def first_moments(found: Checkpoint) -> dict[str, list[Tensor]]:
    """Adam's first moments after one step: the gradients times 1 - beta1."""
    return {
        name: [state["exp_avg"] for state in optimizer["state"].values()]
        for name, optimizer in found.optimizers.items()
    }


ONE = (
    "run.steps=1",
    "optim.lr=1e-9",
    "optim.max_grad_norm=0",
    "optim.betas=[0,0.9]",
    "method.student_every=1",
)


def gradients(recipe: Recipe) -> dict[str, list[Tensor]]:
    running.run(recipe)
    return first_moments(checkpoint(Path(recipe.run.out)))


def assert_close(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(float(tensor.abs().max()) for tensor in one[name])
        assert scale > 0
        for a, b in zip(one[name], other[name], strict=True):
            assert float((a - b).abs().max()) <= tolerance * max(scale, 1.0), name


def test_micro_batches_add_up(tmp_path):
    one = gradients(toy(tmp_path / "one", *ONE))
    four = gradients(toy(tmp_path / "four", *ONE, "optim.micro_batch_size=4"))
    assert_close(one, four, 1e-6)


def test_every_sample_has_its_own_noise_however_the_batch_is_split(tmp_path):
    drawn = []
    for micro in (0, 4):
        recipe = toy(tmp_path, f"optim.micro_batch_size={micro}")
        family, (source,) = running.build(recipe)
        accelerator = Accelerator(cpu=True)
        split = recipe.optim.split(1)
        made = Batches(family, source, accelerator, split, needs_images=True)
        batches = list(made.draw("student", TrainState(seed=0)))
        assert len(batches) == (4 if micro else 1)
        drawn.append([torch.cat([b.x0 for b in batches]), torch.cat([b.randn() for b in batches])])
        assert torch.cat([b.index for b in batches]).tolist() == list(range(16))
    (x0, noise), (x0_split, noise_split) = drawn
    assert torch.equal(x0, x0_split) and torch.equal(noise, noise_split)
    assert len(noise.unique(dim=0)) == 16


def test_gradient_checkpointing_changes_no_gradient(tmp_path, tiny_sd):
    plain = gradients(sd(tmp_path / "plain", tiny_sd, *ONE))
    saved = gradients(sd(tmp_path / "saved", tiny_sd, *ONE, "student.gradient_checkpointing=true"))
    assert_close(plain, saved, 1e-6)
    with pytest.raises(UserError, match=r"student\.gradient_checkpointing=true: this family"):
        running.run(toy(tmp_path / "toy", "student.gradient_checkpointing=true"))


@pytest.mark.parametrize("kind", ["toy", "sd"])
def test_bf16_trains(kind, tmp_path, tiny_sd):
    settings = ("run.steps=2", "run.precision=bf16", "run.log_every=1", "method.student_every=1")
    out = tmp_path / "run"
    running.run(toy(out, *settings, method=GAN) if kind == "toy" else sd(out, tiny_sd, *settings))
    lines = metrics(out)
    assert all(math.isfinite(line[name]) for line in lines[:2] for name in ("student/total", "critic/total"))
    student = checkpoint(out).tensors["student"]
    assert all(t.dtype == torch.float32 for t in student.values() if t.is_floating_point())
    assert lines[0]["student/grad_norm_student"] > 0


def test_settings_of_one_network_reach_its_optimiser(tmp_path):
    overrides = (
        "optim.fake_score.lr=5e-3",
        "optim.fake_score.optimizer=adam",
        "optim.fake_score.betas=[0.5,0.9]",
        "optim.fake_score.weight_decay=0.1",
        "optim.warmup_steps=1",
        "run.save_every=1",
        "run.keep=9",
    )
    recipe = toy(tmp_path / "run", *overrides)
    running.run(recipe)
    factors = [recipe.optim.lr_factor(step, 6) for step in range(6)]
    assert factors[0] == 0.5 and factors[5] < 0.2
    for step in range(6):
        found = checkpoint(tmp_path / "run", step + 1).optimizers
        (student,), (fake,) = (found[name]["param_groups"] for name in ("student", "fake_score"))
        assert student["decoupled_weight_decay"] and not fake["decoupled_weight_decay"]
        assert (fake["betas"], fake["weight_decay"], fake["lr"]) == ((0.5, 0.9), 0.1, 5e-3 * factors[step])
        # The student takes part in every second iteration.
        assert (student["betas"], student["lr"]) == ((0.9, 0.999), 1e-3 * factors[step - step % 2])


def test_each_network_is_clipped_by_itself(tmp_path):
    settings = (
        "run.steps=1",
        "optim.max_grad_norm=0",
        "optim.fake_score.max_grad_norm=1e-3",
        "optim.betas=[0,0.9]",
    )
    found = gradients(toy(tmp_path / "run", *settings, "run.log_every=1"))
    norms = {name: math.sqrt(sum(float(g.square().sum()) for g in part)) for name, part in found.items()}
    line = metrics(tmp_path / "run")[0]
    assert norms["fake_score"] == pytest.approx(1e-3, rel=1e-3)
    # Logged as it was before.
    assert line["critic/grad_norm_fake_score"] > 1e-2
    assert norms["student"] == pytest.approx(line["student/grad_norm_student"], rel=1e-4)


def helper_of(student: Denoiser) -> Denoiser:
    """A copy that is another network from the start."""
    helper = student.clone()
    with torch.no_grad():
        for parameter in helper.parameters():
            parameter.mul_(1.1)
    return helper


class Turns(Method):
    """The student alone, the two together, and the helper alone, each on a loss that hangs on both."""

    def networks(self, teacher: Denoiser | None, student: Denoiser) -> dict[str, nn.Module]:
        return {"helper": helper_of(student)}

    def phases(self, step: int) -> Iterator[Phase]:
        trains = (("student",), ("student", "helper"), ("helper",))[step]
        yield Phase("turn", trains, ((1.0, self.loss),))

    def loss(self, nets: Networks, batch: Batch) -> dict[str, Tensor]:
        t = torch.full((len(batch.index),), 0.5, dtype=torch.float64)
        x_t = batch.randn()
        return {"total": (nets.student(x_t, t).x0 * nets.helper(x_t, t).x0).square().mean()}


@pytest.mark.usefixtures("own_code")
def test_only_whose_turn_it_is_moves_and_the_average_follows_the_student(tmp_path):
    method = {"name": f"{__name__}:Turns"}
    recipe = toy(tmp_path / "run", "run.steps=3", "run.save_every=1", "run.keep=9", method=method)
    running.run(recipe)
    one, two, three = (checkpoint(tmp_path / "run", step).tensors for step in (1, 2, 3))
    student = recipe.family.make().teacher.clone()
    fitted, helper = (dict(each.state_dict()) for each in (student, helper_of(student)))
    assert same(one["helper"], helper) and not same(one["student"], fitted)
    assert not same(one["student"], two["student"]) and not same(one["helper"], two["helper"])
    assert same(two["student"], three["student"]) and not same(two["helper"], three["helper"])
    assert same(two["student_ema"], three["student_ema"])
    assert checkpoint(tmp_path / "run").extra["counters"]["updates"] == {"student": 2, "helper": 2}
    before = {name: fitted[name] for name in one["student_ema"] if name != "updates"}
    for updates, found in enumerate((one, two)):
        decay = min(0.5, (1 + updates) / (10 + updates))
        for name, value in before.items():
            expected = decay * value + (1 - decay) * found["student"][name]
            assert torch.allclose(found["student_ema"][name], expected, atol=1e-7)
        before = {name: found["student_ema"][name] for name in before}


def test_a_composition_names_the_part_whose_loss_is_not_finite(tmp_path, monkeypatch):
    def student_loss(self: LADD, nets: Any, batch: Any, warm: bool = False) -> Any:
        return {"total": torch.full((len(batch.index),), math.nan)}

    monkeypatch.setattr(LADD, "student_loss", student_loss)
    method = {"name": "compose", "parts": [{"name": "dmd2"}, {"name": "ladd"}]}
    with pytest.raises(UserError, match=r"phase 'student' \(term ladd\.student_loss, examples \[\d+, \d+, "):
        running.run(toy(tmp_path / "run", method=method))


def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
    original = DMD2.critic_loss

    bad = []

    def critic_loss(self: DMD2, nets: Any, batch: Any) -> Any:
        losses = original(self, nets, batch)
        if batch.generator.step == 3:
            bad.append(batch.examples[5])
            losses["total"] = losses["total"].where(batch.index != 5, math.nan)
        return losses

    monkeypatch.setattr(DMD2, "critic_loss", critic_loss)
    with pytest.raises(UserError) as error:
        running.run(toy(tmp_path / "run", "run.save_every=1"))
    assert str(error.value).startswith(
        f"the loss of phase 'critic' (term critic_loss, examples {bad} of the data) is not finite at step 3;"
        " the last checkpoint is step 3."
    )
    assert checkpoint(tmp_path / "run").step == 3


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path, monkeypatch):
    """Its loss is finite, and the checkpoint written after it would have been lost for good."""
    original = DMD2.student_loss

    def student(self: DMD2, nets: Any, batch: Any) -> Any:
        losses = original(self, nets, batch)
        if batch.generator.step == 2:
            weight = next(nets.student.parameters())
            losses["total"] = losses["total"] + (weight.sum() * 0).sqrt()
        return losses

    monkeypatch.setattr(DMD2, "student_loss", student)
    with pytest.raises(UserError, match="the gradient of student in phase 'student' is not finite at step 2"):
        running.run(toy(tmp_path / "run", "run.save_every=1"))
    found = checkpoint(tmp_path / "run")
    assert found.step == 2 and all(t.isfinite().all() for t in found.tensors["student"].values())


def test_running_statistics_are_averaged_over_processes_after_each_iteration(tmp_path, monkeypatch):
    """A process of two, whose other one is met in `reduce` alone."""
    asked: list[tuple[tuple[int, ...], str]] = []

    class Two:
        num_processes = 2

        def __init__(self, one):
            self.one = one

        def __getattr__(self, name):
            return getattr(self.one, name)

        def reduce(self, value, how):
            asked.append((tuple(value.shape), how))
            return value

    def step(self):
        one, self.accelerator = self.accelerator, Two(self.accelerator)
        original(self)
        self.accelerator = one

    original = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", step)
    method = {"name": "f_distill", "gan_weight": 0.1, "time_bins": 3, "student_every": 1}
    running.run(toy(tmp_path / "run", "run.steps=2", "student.steps=[1]", method=method))
    assert asked.count(((3,), "mean")) == 2 * 2
