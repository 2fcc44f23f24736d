"""The loop: what is interrupted goes on bit for bit, what is split adds up, and what is frozen stays."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import stepdistill
from stepdistill.config import apply_overrides
from stepdistill.errors import UserError
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.ladd import LADD
from training import preview
from training import run as running
from training import trainer as training_trainer
from training.checkpoint import Checkpoint, RunDirectory
from training.measure import check_metric, lower_is_better
from training.recipe import Recipe, recipe_from
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("accelerator_state")

TOY = {
    "family": {"name": "toy", "fit_steps": 3},
    "student": {"steps": [1, 2], "ema": 0.5},
    "method": {"name": "dmd2", "student_every": 2, "guidance_scale": 1.0},
    "data": {"name": "toy", "size": 40},
    "optim": {"lr": 1e-3, "batch_size": 16, "schedule": "cosine"},
    "run": {"steps": 6, "log_every": 2},
}
LCM = {"name": "lcm", "guidance_low": 1.0, "guidance_high": 2.0, "ddim_steps": 4}
GAN = {"name": "dmd2", "student_every": 2, "gan_weight": 0.1, "guidance_scale": 2.0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and relative paths stay out of the checkout; TensorBoard is not what is tested here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.loggers.TensorBoardLogger", _no_tensorboard)


def _no_tensorboard(*args: Any) -> None:
    raise ImportError


def toy(out: Path, *overrides: str, **sections: Any) -> Recipe:
    mapping = {**TOY, **sections, "run": {**TOY["run"], **sections.get("run", {}), "out": str(out)}}
    return recipe_from(apply_overrides(mapping, overrides))


def sd(out: Path, teacher: Path, *overrides: str, **sections: Any) -> Recipe:
    """DMD2 on the 16x16 pipeline; scenes are drawn at that size where images are needed."""
    family = {"name": "sd", "teacher": str(teacher)}
    data = {"name": "scenes", "size": 24, "resolution": 16}
    optim = {**TOY["optim"], "batch_size": 4}
    return toy(out, *overrides, **{"family": family, "data": data, "optim": optim, "method": GAN, **sections})


def checkpoint(out: Path, step: int | None = None) -> Checkpoint:
    directory = RunDirectory(out)
    return directory.load(directory.latest() if step is None else step)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, in whatever is nested."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if "seconds" not in str(key))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one: Path, other: Path) -> None:
    a, b = checkpoint(one), checkpoint(other)
    assert same(a.tensors, b.tensors) and same(a.optimizers, b.optimizers) and same(a.extra, b.extra)
    assert metrics(one) == metrics(other)


def interrupt_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C while `step` (0-based, over all stages) is being computed."""
    original = Trainer._one_step

    def one_step(self: Trainer) -> None:
        if self.offset + self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    monkeypatch.setattr(Trainer, "_one_step", one_step)


def trainer_of(recipe: Recipe) -> Trainer:
    family, sources = running.build(recipe)
    accelerator = running._accelerator(recipe)
    stage = recipe.stages()[0]
    x0 = running._latents(family, sources[0], accelerator) if family.latent else None
    directory = RunDirectory(recipe.run.out)
    directory.begin(recipe)
    return Trainer(stage, recipe, accelerator, family, sources[0], x0, directory, None)


# --------------------------------------------------------------------------------------------------- resuming


# What the score methods need to be quick on the toy.
SCORE = {name: {"name": name} for name in ("sim", "sid", "diff_instruct", "vsd", "f_distill")} | {
    name: {"name": name, "pair_count": 20, "pair_steps": 3} for name in ("dmd", "kd")
}


@pytest.mark.parametrize(
    "kind",
    ["toy-dmd2", "toy-lcm", "toy-compose", "sd-prompts", "sd-gan", "sd-vsd", *(f"toy-{n}" for n in SCORE)],
)
def test_an_interrupted_run_goes_on_bit_for_bit(kind, tmp_path, tiny_sd, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    (tmp_path / "prompts.txt").write_text("a small red circle on a black background\na large blue star\n" * 3)
    parts = [{"name": "dmd2", "gan_weight": 0.1, "student_every": 2}, {"name": "dmd2", "weight": 0.5}]
    make = {
        "toy-dmd2": lambda out: toy(out),
        "toy-lcm": lambda out: toy(out, method=LCM),
        "toy-compose": lambda out: toy(out, method={"name": "compose", "parts": parts}),
        "sd-prompts": lambda out: sd(
            out, tiny_sd, method="dmd2", data={"name": "prompts", "path": str(tmp_path / "prompts.txt")}
        ),
        "sd-gan": lambda out: sd(out, tiny_sd),
        "sd-vsd": lambda out: sd(out, tiny_sd, method={"name": "vsd", "lora_rank": 2}),
        **{f"toy-{n}": lambda out, method=method: toy(out, method=method) for n, method in SCORE.items()},
    }[kind]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    running.run(make(whole))
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            running.run(make(halves))
    assert RunDirectory(halves).steps() == [3]  # the step that was under way is finished and kept
    assert signal.getsignal(signal.SIGINT) is before  # which a background shell may have set to be ignored
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
    running.run(toy(out, "method.student_every=3", "run.steps=8"))  # more steps go on from what there is
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
        starts.append({name: value.clone() for name, value in self.raw["student"].state_dict().items()})
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


# --------------------------------------------------------------------------------------------------- one step


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
    for split in (0, 4):
        trainer = trainer_of(
            toy(tmp_path / str(split), f"optim.micro_batch_size={split}", "method.gan_weight=1")
        )
        (phase, *_) = trainer.method.phases(0)
        batches = list(trainer._batches(phase))
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
        trainer_of(toy(tmp_path / "toy", "student.gradient_checkpointing=true"))


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
    )
    trainer = trainer_of(
        toy(tmp_path / "run", *overrides, "optim.fake_score.weight_decay=0.1", "optim.warmup_steps=1")
    )
    student, fake = (trainer.optimizers[name].optimizer for name in ("student", "fake_score"))
    assert type(student) is torch.optim.AdamW and type(fake) is torch.optim.Adam
    assert fake.param_groups[0]["betas"] == (0.5, 0.9) and fake.param_groups[0]["weight_decay"] == 0.1
    assert student.param_groups[0]["betas"] == (0.9, 0.999)
    for step in range(3):
        trainer._one_step()
        factor = trainer.optim.lr_factor(step, 6)
        assert fake.param_groups[0]["lr"] == 5e-3 * factor
        if step % 2 == 0:
            assert student.param_groups[0]["lr"] == 1e-3 * factor
    assert trainer.optim.lr_factor(0, 6) == 0.5 and trainer.optim.lr_factor(5, 6) < 0.2


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
    assert line["critic/grad_norm_fake_score"] > 1e-2  # logged as it was before
    assert norms["student"] == pytest.approx(line["student/grad_norm_student"], rel=1e-4)


def test_the_average_follows_the_student_and_frozen_networks_stay(tmp_path):
    trainer = trainer_of(toy(tmp_path / "run", "method.gan_weight=0.1"))
    student_phase, critic_phase = trainer.method.phases(0)

    def state(*names: str) -> dict[str, Any]:
        return {n: {k: v.clone() for k, v in trainer.raw[n].state_dict().items()} for n in names}

    def average() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in trainer.ema.shadow.items()}

    start, shadow = state("student", "fake_score", "discriminator"), average()
    trainer._run(critic_phase)
    assert same(start["student"], state("student")["student"]) and same(shadow, average())
    moved = state("fake_score", "discriminator")
    assert not same(start["fake_score"], moved["fake_score"])
    assert not same(start["discriminator"], moved["discriminator"])
    trainer._run(student_phase)
    assert same(moved, state("fake_score", "discriminator"))
    now = trainer.raw["student"].state_dict()
    for name, value in average().items():
        kept = min(0.5, 1 / 10)  # the decay in force after no update
        assert torch.allclose(value, kept * shadow[name] + (1 - kept) * now[name], atol=1e-7)
    trainer._run(critic_phase)
    assert trainer.ema.updates == 1
    assert trainer.updates == {"student": 1, "fake_score": 2, "discriminator": 2}
    assert all(p.grad is None for module in trainer.raw.values() for p in module.parameters())


def test_a_composition_names_the_part_whose_loss_is_not_finite(tmp_path, monkeypatch):
    def student_loss(self: LADD, nets: Any, batch: Any, warm: bool = False) -> Any:
        return {"total": torch.full((len(batch.index),), math.nan)}

    monkeypatch.setattr(LADD, "student_loss", student_loss)
    method = {"name": "compose", "parts": [{"name": "dmd2"}, {"name": "ladd"}]}
    with pytest.raises(UserError, match=r"phase 'student' \(term ladd\.student_loss, samples \[0, 1, 2"):
        running.run(toy(tmp_path / "run", method=method))


def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
    original = DMD2.critic_loss

    def critic_loss(self: DMD2, nets: Any, batch: Any) -> Any:
        losses = original(self, nets, batch)
        if batch.generator.step == 3:
            losses["total"] = losses["total"].where(batch.index != 5, math.nan)
        return losses

    monkeypatch.setattr(DMD2, "critic_loss", critic_loss)
    with pytest.raises(UserError) as error:
        running.run(toy(tmp_path / "run", "run.save_every=1"))
    assert str(error.value).startswith(
        "the loss of phase 'critic' (term critic_loss, samples [5]) is not finite at step 3;"
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


# ---------------------------------------------------------------------------------------------- two processes


def _process(rank: int, port: int, recipe: Recipe, folder: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    original = Trainer.fit

    def fit(self: Trainer) -> Any:
        assert self.accelerator.num_processes == 2
        try:
            return original(self)
        finally:
            for name, module in self.raw.items():
                save_file(module.state_dict(), folder / f"{name}-{rank}.safetensors")

    Trainer.fit = fit
    running.run(recipe)


def two_processes(recipe: Recipe, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    # Forked, so that each need not import everything again.
    torch.multiprocessing.start_processes(_process, (port, recipe, folder), nprocs=2, start_method="fork")


@pytest.mark.parametrize("kind", ["toy", "sd-gan"])
def test_two_processes_train_what_one_trains(kind, tmp_path, tiny_sd):
    """Where a gradient is almost nothing, Adam makes rounding count in full: hence the large eps."""
    settings = ("run.steps=4", "run.log_every=1", "optim.eps=1e-3", "optim.max_grad_norm=1")

    def make(name: str, *more: str) -> Recipe:
        if kind == "toy":
            return toy(tmp_path / name, *settings, *more)
        return sd(tmp_path / name, tiny_sd, *settings, *more)

    two_processes(make("two", "optim.micro_batch_size=2", "run.preview_every=2"), tmp_path / "ranks")
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
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
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
        two_processes(toy(tmp_path / "file"), tmp_path / "ranks")


def test_two_processes_stop_after_the_same_step_and_measure(tmp_path, monkeypatch):
    """One process alone gets the signal, and one alone measures; neither may leave the other waiting."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    measuring = ("run.metric=sw1", "run.metric_every=2", "run.save_every=3")
    two_processes(toy(whole, *measuring), tmp_path / "ranks")
    with monkeypatch.context() as patch:
        original = Trainer._one_step

        def one_step(self: Trainer) -> None:
            if self.step == 2 and self.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self)

        patch.setattr(Trainer, "_one_step", one_step)
        two_processes(
            toy(halves, *measuring), tmp_path / "ranks2"
        )  # torch takes KeyboardInterrupt for an end
    assert RunDirectory(halves).latest() == 3
    two_processes(toy(halves, *measuring), tmp_path / "ranks3")
    assert same(checkpoint(whole).tensors, checkpoint(halves).tensors)


# ------------------------------------------------------------------------------------------ previews, metrics


def test_previews_show_student_teacher_and_fake_score(tmp_path, tiny_sd, monkeypatch):
    titles, original = [], preview.grid

    def grid(rows: list[tuple[str, np.ndarray]], notes: list[str]) -> Image.Image:
        titles.append([title for title, _ in rows])
        assert all(picture.shape == (16, 16 * 3, 3) for _, picture in rows)
        return original(rows, notes)

    monkeypatch.setattr(preview, "grid", grid)
    monkeypatch.setattr(preview, "TEACHER_STEPS", 3)
    settings = ("run.steps=2", "run.preview_every=1", "run.preview_count=3")
    for name in ("one", "two"):
        running.run(sd(tmp_path / name, tiny_sd, *settings))
    expected = ["student, 1 step", "student, 2 steps", "teacher, 3 steps"]
    assert titles == [[*expected, "fake_score: x0 of the student's images at half the noise"]] * 6
    files = [sorted((tmp_path / name / "previews").iterdir()) for name in ("one", "two")]
    assert [path.name for path in files[0]] == ["0000000.png", "0000001.png", "0000002.png"]
    pictures = [[path.read_bytes() for path in part] for part in files]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == 3
    with Image.open(files[0][0]) as image:
        assert image.size == (48, 4 * (14 + 16))


def test_a_preview_changes_nothing_in_training(tmp_path, tiny_sd):
    running.run(sd(tmp_path / "without", tiny_sd, "run.steps=2"))
    running.run(sd(tmp_path / "with", tiny_sd, "run.steps=2", "run.preview_every=1", "run.preview_count=2"))
    assert same(checkpoint(tmp_path / "without").tensors, checkpoint(tmp_path / "with").tensors)


def test_the_metric_is_logged_and_its_best_checkpoint_kept(tmp_path, monkeypatch):
    real = training_trainer.measure
    values = []

    def measured(*args: Any) -> float:
        values.append(real(*args))
        return values[-1]

    monkeypatch.setattr(training_trainer, "measure", measured)
    settings = ("run.metric=sw1", "run.metric_every=2", "run.keep=1", "optim.lr=1e-2")
    running.run(toy(tmp_path / "run", *settings))
    assert [line["metric/sw1"] for line in metrics(tmp_path / "run") if "metric/sw1" in line][:3] == values
    best = RunDirectory(tmp_path / "run").best()
    assert best == (2 * (1 + values.index(min(values))), min(values))
    assert set(RunDirectory(tmp_path / "run").steps()) == {best[0], 6}


def test_scores_rise_and_distances_fall(tmp_path, tiny_sd, monkeypatch):
    values = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(training_trainer, "measure", lambda *args: next(values))
    running.run(
        sd(
            tmp_path / "run",
            tiny_sd,
            "run.metric=attributes/all",
            "run.metric_every=1",
            "run.steps=3",
            "run.keep=1",
        )
    )
    assert RunDirectory(tmp_path / "run").best() == (2, 0.3) and RunDirectory(tmp_path / "run").steps() == [
        2,
        3,
    ]
    directions = {"fd:scenes-v1": True, "sw1": True, "clip:scenes-v1": False, "attributes/all": False}
    assert {name: lower_is_better(name) for name in directions} == directions


def test_attributes_are_measured_on_the_exported_student(tmp_path, tiny_sd):
    settings = ("run.metric=attributes/all", "run.metric_every=1", "run.steps=1", "run.metric_samples=3")
    running.run(sd(tmp_path / "run", tiny_sd, *settings))
    (value,) = (
        line["metric/attributes/all"] for line in metrics(tmp_path / "run") if "metric/attributes/all" in line
    )
    assert 0 <= value <= 1


def test_the_evaluation_is_asked_for_the_metric_by_name(tmp_path, tiny_sd, monkeypatch):
    asked = {}

    def evaluate(draw: Any, **settings: Any) -> dict[str, float]:
        asked.update(settings, images=draw(["a large red star on a black background"], [0]))
        return {"fd:scenes-v1": 12.5, "fd:scenes-v1/se": 1.0}

    monkeypatch.setattr("evaluation.evaluate", evaluate)
    running.run(sd(tmp_path / "run", tiny_sd, "run.metric_every=1", "run.steps=1", "run.metric_samples=7"))
    assert (asked["n"], asked["metrics"], asked["extractor"]) == (7, ("fd",), "scenes-v1")
    assert asked["reference"] is None and asked["images"].shape == (1, 3, 16, 16)
    assert RunDirectory(tmp_path / "run").best() == (1, 12.5)


def labelled_images(folder: Path, classes: int = 3, each: int = 4, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")
    return folder


def pixel(out: Path, teacher: Path, images: Path, *overrides: str) -> Recipe:
    family = {"name": "pixel", "teacher": str(teacher)}
    data = {"name": "folder", "path": str(images), "resolution": 8}
    return toy(out, "run.steps=2", "optim.batch_size=4", *overrides, family=family, data=data)


def test_classes_are_measured_against_a_reference(tmp_path, tiny_pixel):
    images = labelled_images(tmp_path / "images")
    settings = ("run.metric_every=2", "run.metric_samples=6")
    with pytest.raises(UserError, match=r"run\.metric=fd:scenes-v1 needs run\.metric_reference here"):
        running.run(pixel(tmp_path / "run", tiny_pixel, images, *settings))
    running.run(pixel(tmp_path / "run", tiny_pixel, images, *settings, f"run.metric_reference={images}"))
    (value,) = (
        v for line in metrics(tmp_path / "run") for k, v in line.items() if k == "metric/fd:scenes-v1"
    )
    assert value > 0 and math.isfinite(value)
    assert stepdistill.load(tmp_path / "run" / "student").class_names is not None


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        ("fdd:scenes-v1", "", "run.metric=fdd:scenes-v1 cannot be measured on the family 'sd'"),
        ("clip", "", "did you mean clip:scenes-v1?"),
        ("attributes/colors", "", "did you mean attributes/colours?"),
        ("latency", "", "choose one of fd:scenes-v1, clip:scenes-v1, attributes/all"),
        ("fd:scene-v1", "", "there is no extractor 'scene-v1'"),
        ("fd:scenes-v1", "images", "run.metric_reference=images is for families without prompts"),
    ],
)
def test_a_wrong_metric_is_found_before_training(metric, reference, message, tmp_path, tiny_sd):
    settings = (f"run.metric={metric}", "run.metric_every=1", f"run.metric_reference='{reference}'")
    with pytest.raises(UserError) as error:
        running.run(sd(tmp_path / "run", tiny_sd, *settings))
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_the_toy_has_its_own_metric(tmp_path):
    recipe = toy(tmp_path / "run", "run.metric_every=1")
    family, _ = running.build(toy(tmp_path / "run"))
    with pytest.raises(UserError, match=r"on the family 'toy'; choose one of sw1, modes\."):
        check_metric(recipe.run, family)


# ----------------------------------------------------------------------------------------------------- export


def test_any_checkpoint_can_be_exported(tmp_path, tiny_sd):
    recipe = sd(tmp_path / "run", tiny_sd, "run.steps=3", "run.save_every=1", "run.keep=3", "student.ema=0.9")
    running.run(recipe)
    run = tmp_path / "run"
    RunDirectory(run, keep=3).record_best(2, 0.5)
    unets = {}
    for which, step in (("1", 1), ("best", 2), ("latest", 3)):
        for weights in ("ema", "raw"):
            chosen = sd(run, tiny_sd, "run.steps=3", "student.ema=0.9", f"run.export={weights}")
            said = running.export_checkpoint(chosen, which)
            target = run / f"student-{step}-{weights}"
            assert said == f"exported to {target}"
            sampler = stepdistill.load(target)
            assert (sampler.kind, sampler.steps) == ("student", (1, 2))
            assert sampler.card["step"] == step and sampler.card["weights"] == weights
            unets[step, weights] = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    final = load_file(run / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(unets[3, "ema"], final) and not same(unets[3, "raw"], final)
    assert not same(unets[1, "ema"], final)
    raw = checkpoint(run, 1).tensors["student"]
    name = "conv_in.weight"
    assert torch.equal(unets[1, "raw"][name], raw[f"network.unet.{name}"])
    images = stepdistill.load(run / "student")(["a large red star on a black background"], [0], chunk=1)
    assert images.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"there are checkpoints of steps \[1, 2, 3\]"):
        running.export_checkpoint(recipe, "newest")
    with pytest.raises(UserError, match=r"no complete checkpoint .*; complete are the steps \[1, 2, 3\]"):
        running.export_checkpoint(recipe, "7")


def test_a_staged_student_is_exported_with_its_last_method(tmp_path, tiny_sd):
    mapping = sd(tmp_path / "run", tiny_sd).mapping()
    del mapping["method"]
    mapping["stages"] = [
        {"method": {**LCM, "ddim_steps": 4}, "run": {"steps": 1}},
        {"method": {"name": "dmd2"}, "run": {"steps": 1}},
    ]
    del mapping["run"]["steps"]
    running.run(recipe_from(mapping))
    sampler = stepdistill.load(tmp_path / "run" / "student")
    assert sampler.card["method"] == "dmd2" and sampler.guidance_free and sampler.card["extras"] == []
    assert [stage["method"]["name"] for stage in sampler.card["recipe"]["stages"]] == ["lcm", "dmd2"]
