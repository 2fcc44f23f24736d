"""No fault costs what was saved: bits that rot, checkpoints that vanish, a second run, numbers that are not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, checkpoint, metrics, toy

from stepdistill.errors import Interrupted, UserError, cli_errors
from training import interrupts, origin, trainer
from training import run as running
from training.checkpoint import RunDirectory
from training.lock import Lock
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_runs")


def flip(path: Path, at: int = -5) -> None:
    """One bit of a file, in its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def stop_in(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """A signal while `step` (0-based) is being computed."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        original(self)

    patch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(place, short_runs) -> Path:
    """A run of six steps nobody disturbed, with checkpoints of four and six; made once."""
    if not place.exists():
        running.run(toy(place, "run.save_every=2"))
    return place


def copied(whole: Path, out: Path) -> Path:
    return Path(shutil.copytree(whole, out))


@pytest.mark.parametrize(
    "name", ["student.safetensors", "fake_score.optimizer.safetensors", "extra.json", "state.json"]
)
def test_one_flipped_bit_is_found_and_the_checkpoint_before_is_gone_on_from(name, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    flip(out / "checkpoints" / "6" / name)
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text().replace(str(whole), str(out)))
    running.run(toy(out, "run.save_every=2"))
    said = capsys.readouterr().err
    assert "warning W01: the checkpoint of step 6 is damaged" in said and "going on from step 4" in said
    assert_same_run(whole, out)
    # What was damaged is kept for who wants to look, under a name that nothing reads.
    assert (out / "checkpoints" / "damaged-6").is_dir()


@pytest.mark.parametrize("how", ["flipped", "emptied"])
def test_without_a_whole_checkpoint_nothing_is_begun_again(how, whole, tmp_path):
    out = copied(whole, tmp_path / "run")
    for step in (4, 6):
        file = out / "checkpoints" / str(step) / "student.safetensors"
        if how == "flipped":
            flip(file)
        else:
            file.unlink()
    log = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"no whole checkpoint to go on from \(4: student.safetensors .*; 6: "
    ):
        running.run(toy(out, "run.save_every=2"))
    assert (out / "metrics.jsonl").read_bytes() == log
    assert {"4", "6"} <= {path.name for path in (out / "checkpoints").iterdir()}
    with pytest.raises(UserError, match=r"checksum|complete"):
        RunDirectory(out).load(6)


def test_a_checkpoint_is_of_finite_numbers(tmp_path, monkeypatch):
    """What is poisoned is never saved, so the same command goes on from before it."""

    def poison(self: Trainer) -> None:
        original(self)
        if self.state.global_step == 5:
            next(self.modules["student"].parameters()).data[0] = torch.nan

    original, out = Trainer.train_step, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", poison)
        with pytest.raises(UserError, match=r"of student.*is not finite.*last checkpoint is step 4"):
            running.run(toy(out, "run.save_every=1", "run.log_every=1"))
    assert RunDirectory(out).steps() == [3, 4]
    running.run(toy(out, "run.save_every=1", "run.log_every=1"))
    assert checkpoint(out).step == 6


@pytest.mark.parametrize("part", ["student_ema", "optimizer"])
def test_averages_and_optimisers_are_looked_at_too(part, tmp_path):
    run, weights = RunDirectory(tmp_path), {"w": torch.ones(2)}
    bad = torch.tensor([1.0, torch.inf])
    tensors = {"student": weights, "student_ema": {"w": bad} if part == "student_ema" else weights}
    state = {0: {"exp_avg": bad if part == "optimizer" else torch.ones(2)}}
    with pytest.raises(UserError, match=r"not finite at step 3; the last checkpoint is none"):
        run.save(3, tensors, {"student": {"state": state, "param_groups": []}}, {})
    assert run.steps() == []


def test_saves_go_by_the_clock_that_nobody_sets(tmp_path, monkeypatch):
    """A default run has something to resume; a jump of the wall clock neither brings a save nor puts one off."""
    now = [0.0]

    def step(self: Trainer) -> None:
        original(self)
        now[0] += 60 * 8

    original = Trainer.train_step
    saves: list[int] = []
    kept = RunDirectory.save
    monkeypatch.setattr(RunDirectory, "save", lambda self, n, *rest: (saves.append(n), kept(self, n, *rest)))
    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - 1e9)
    running.run(toy(tmp_path / "run"))
    assert saves == [2, 4, 6]
    saves.clear()
    running.run(toy(tmp_path / "off", "run.save_minutes=0"))
    assert saves == [6]


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)]


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_saves_and_tells_which_it_was(number, code, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    # A run under nohup goes on when its terminal hangs up, and so would the tests.
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            stop_in(patch, 2, number)
            with pytest.raises(SystemExit) as end, cli_errors():
                running.run(toy(out, "run.save_every=2"))
    finally:
        signal.signal(number, before)
    assert end.value.code == code and RunDirectory(out).latest() == 3
    running.run(toy(out, "run.save_every=2"))
    assert_same_run(whole, out)


def test_usr1_saves_and_goes_on(tmp_path, monkeypatch):
    saves: list[int] = []
    kept = RunDirectory.save
    monkeypatch.setattr(RunDirectory, "save", lambda self, n, *rest: (saves.append(n), kept(self, n, *rest)))
    stop_in(monkeypatch, 2, signal.SIGUSR1)
    running.run(toy(tmp_path / "run"))
    assert saves == [3, 6]


def test_a_second_signal_ends_at_once_and_nohup_is_heeded(monkeypatch):
    monkeypatch.setattr(interrupts, "IMPATIENT", -1.0)
    with interrupts.deferred() as asked, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.ending == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.deferred() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.ending
    finally:
        signal.signal(signal.SIGHUP, before)
    assert Interrupted(signal.SIGHUP).number == 1


def test_two_runs_do_not_share_a_directory_and_a_crash_frees_it(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        held = Lock(out / ".lock")
        os.write(ready[1], b"1" if held.take() else b"0")
        os.read(go[0], 1)
        os._exit(9)
    assert os.read(ready[0], 1) == b"1"
    with pytest.raises(UserError, match=rf"another run is at work in .*run \(process {child}\)"):
        running.run(toy(out))
    assert not (out / "recipe.yaml").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    running.run(toy(out, "run.steps=2"))
    # And the end of a run frees it as well.
    assert Lock(out / ".lock").take()


def test_fresh_is_the_old_run_or_a_new_one(whole, tmp_path, monkeypatch):
    """Killed half-way through clearing, the next start never goes on with the old weights."""
    out = copied(whole, tmp_path / "run")
    child = os.fork()
    if child == 0:
        from training import checkpoint as module

        real = module.remove

        def killed(*paths: Path) -> None:
            real(*paths[:2])
            os._exit(9)

        module.remove = killed
        RunDirectory(out).begin(toy(out, "method.student_every=3"), fresh=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    # Its weights still lie there, and are nobody's.
    assert (out / "checkpoints" / "6" / "student.safetensors").exists() and RunDirectory(out).steps() == []
    assert RunDirectory(out).begin(toy(out, "method.student_every=3")) == 0
    assert not list((out / "checkpoints").iterdir()) and not (out / "metrics.jsonl").exists()


def test_what_killed_writes_left_is_removed(whole, tmp_path):
    out = copied(whole, tmp_path / "run")
    for left in (".student.abc", ".recipe.yaml.x1", "checkpoints/.8.q", "previews/.0000001.png.z"):
        (out / left).mkdir(parents=True)
    (out / ".mine").touch()
    RunDirectory(out).begin(toy(out))
    hidden = [path.name for path in out.rglob(".*")]
    assert sorted(hidden) == [".lock", ".mine"]


def test_a_stale_student_is_not_the_end(tiny_sd, tmp_path, monkeypatch):
    """A run that was made longer and was killed before its export is not finished."""
    from runs import sd

    out = tmp_path / "run"
    running.run(sd(out, tiny_sd, "run.steps=1"))
    with monkeypatch.context() as patch:
        patch.setattr(running, "_finish", lambda *_: None)
        running.run(sd(out, tiny_sd, "run.steps=2"))
    assert RunDirectory(out).latest() == 2 and RunDirectory(out).exported() == 1
    running.run(sd(out, tiny_sd, "run.steps=2"))
    assert RunDirectory(out).exported() == 2


def test_what_may_change_is_said_and_what_may_not_is_refused_by_name(whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    with pytest.raises(UserError) as refused:
        running.run(
            toy(out, "optim.optimizer=adam", "method.student_every=5", "optim.fake_score.optimizer=radam")
        )
    for name in (
        "optim.optimizer=adamw, and this recipe has adam",
        "method.student_every=2",
        "optim.fake_score.optimizer=nothing, and this recipe has radam",
    ):
        assert name in str(refused.value)
    running.run(toy(out, "run.steps=7", "optim.lr=1e-2", "run.seed=3", "data.size=41"))
    said = capsys.readouterr().err
    assert "optim.lr was 0.001 and is 0.01; run.steps was 6 and is 7" in said.replace(
        "run.seed was 0 and is 3; ", ""
    )
    assert (
        "data.size was 40 and is 41" in said and "run.seed was 0 and is 3" in said and "warning W03" in said
    )


def test_a_teacher_edited_in_place_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "run"
    running.run(toy(out, "run.steps=2"))
    written = json.loads((out / "checkpoints" / "2" / "extra.json").read_text())
    assert len(written["teacher"]) == 64
    monkeypatch.setattr(origin, "sha256_of_weights", lambda module: "0" * 64)
    with pytest.raises(UserError, match="the teacher's weights are not those"):
        running.run(toy(out, "run.steps=4"))


def test_a_log_without_a_checkpoint_begins_again_aloud(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(KeyboardInterrupt):
            running.run(toy(out, "run.log_every=1"))
    running.run(toy(out, "run.log_every=1"))
    assert "warning W09" in capsys.readouterr().err
    assert [line["step"] for line in metrics(out) if "lr" in line] == [1, 2, 3, 4, 5, 6]


def test_a_restored_run_keeps_nothing_of_a_checkpoint_mapped(whole, tmp_path):
    """Views of a file would hold its disk after it is pruned."""
    kept: Any = RunDirectory(whole).load(6)
    maps = Path("/proc/self/maps")
    assert kept.tensors and (not maps.exists() or str(whole / "checkpoints") not in maps.read_text())
