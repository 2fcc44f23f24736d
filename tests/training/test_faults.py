"""Faults from outside: full and read-only disks, numbers that are not finite, kills between a save and what follows it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import two_processes
from runs import assert_same_run, checkpoint, metrics, sd, toy
from safetensors import SafetensorError
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from stepdistill import export
from stepdistill.errors import Interrupted, UserError, cli_errors
from stepdistill.families.latent import Latent
from stepdistill.methods.assemble import trained_by
from stepdistill.methods.base import Method, Phase
from stepdistill.methods.dmd2 import DMD2
from training import disk, files, launch, lock
from training import run as running
from training.checkpoint import RunDirectory
from training.exporting import Exported
from training.lock import Lock
from training.monitor import Monitor
from training.sections import RunConfig
from training.shards import Shards
from training.trackers import JsonlTracker
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_runs")

# The words of safetensors 0.8.
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def broken_critic(calls: set[int], ranks: tuple[str, ...] = ("0",)) -> Any:
    """DMD2's loss of the fake score, not finite in these of its calls, in these processes."""
    original, count = DMD2.critic_loss, iter(range(10**6))

    def critic_loss(self: DMD2, nets: Any, batch: Any) -> dict[str, Tensor]:
        losses = original(self, nets, batch)
        if next(count) in calls and os.environ.get("RANK", "0") in ranks:
            losses["total"] = losses["total"] * torch.inf
        return losses

    return critic_loss


def test_a_loss_that_is_not_finite_stops_a_run_or_costs_an_update(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(DMD2, "critic_loss", broken_critic({1}))
        with pytest.raises(UserError, match=r"the loss of phase 'critic'.*is not finite at step 1"):
            running.run(toy(tmp_path / "stop"))
    skip = ("run.on_nonfinite=skip", "run.nonfinite_budget=2", "run.log_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(DMD2, "critic_loss", broken_critic({1, 4}))
        running.run(toy(tmp_path / "skip", *skip))
    assert capsys.readouterr().err.count("warning W07") == 2
    counters = checkpoint(tmp_path / "skip").extra["counters"]
    assert counters["skipped"] == 2 and counters["updates"]["fake_score"] == 4
    # What was left out is in no mean.
    assert all("critic/total" not in line for line in metrics(tmp_path / "skip") if line["step"] in (2, 5))
    with monkeypatch.context() as patch:
        patch.setattr(DMD2, "critic_loss", broken_critic({1, 3, 4}))
        with pytest.raises(UserError, match=r"2 updates were left out before \(run\.nonfinite_budget\)"):
            running.run(toy(tmp_path / "budget", *skip))


def _skipping(rank: int, recipe: Any, folder: Path) -> None:
    DMD2.critic_loss = broken_critic({1}, ranks=("1",))
    running.run(recipe)
    (folder / str(rank)).touch()


def test_an_update_is_left_out_by_all_processes_or_by_none(tmp_path):
    """Where one of two has a loss that is not finite; neither waits for the other."""
    recipe = toy(tmp_path / "two", "run.on_nonfinite=skip", "run.log_every=1")
    two_processes(_skipping, recipe, tmp_path)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
    assert checkpoint(tmp_path / "two").extra["counters"]["updates"]["fake_score"] == 5


def _dying(rank: int, recipe: Any, folder: Path) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        if rank == 1 and self.state.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    Trainer.train_step = train_step
    try:
        running.run(recipe)
    except UserError as error:
        (folder / "said").write_text(str(error))
        raise


def test_the_death_of_one_process_is_a_sentence_of_the_other(tmp_path):
    recipe = toy(tmp_path / "two", "run.save_every=2")
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        two_processes(_dying, recipe, tmp_path)
    assert (tmp_path / "said").read_text().startswith("another process of this run has ended")
    assert RunDirectory(tmp_path / "two").latest() == 2 and not Lock(tmp_path / "two" / ".lock").held()


def test_a_full_disk_stops_a_run_with_what_was_saved_or_is_waited_for(tmp_path, monkeypatch, capsys):
    real, calls = files.save_file, []

    def full(*given: Any) -> None:
        calls.append(1)
        # Within the second checkpoint.
        if len(calls) in (8, 9):
            raise SafetensorError(FULL)
        real(*given)

    monkeypatch.setattr(files, "save_file", full)
    naps: list[float] = []
    monkeypatch.setattr(disk.time, "sleep", naps.append)
    with pytest.raises(SystemExit) as end, cli_errors():
        running.run(toy(tmp_path / "stop", "run.save_every=2"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "error: the disk is full while writing" in said and "Traceback" not in said
    assert RunDirectory(tmp_path / "stop").load(2) and not naps
    calls.clear()
    running.run(toy(tmp_path / "wait", "run.save_every=2", "run.on_full_disk=wait"))
    assert naps == [disk.PAUSE] * 2 and capsys.readouterr().err.count("warning W08") == 1
    monkeypatch.undo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_line_of_the_log_is_whole_or_not_there(tmp_path, monkeypatch):
    for policy in ("stop", "wait"):
        tracker = JsonlTracker(tmp_path / f"{policy}.jsonl", full_disk=policy)
        tracker.start()
        tracker.log({"a": 1.0}, 1)
        kept, tracker._file = tracker._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115

        def room(_: float, tracker: Any = tracker, kept: Any = kept) -> None:
            tracker._file = kept

        monkeypatch.setattr(disk.time, "sleep", room)
        if policy == "stop":
            with pytest.raises(OSError, match="No space left") as error:
                tracker.log({"a": 2.0}, 2)
            assert error.value.filename == str(tracker.path)
        else:
            tracker.log({"a": 2.0}, 2)
            assert [line["step"] for line in files.lines_of(tracker.path)] == [1, 2]


def test_an_export_without_room_is_a_sentence_and_is_made_by_the_next_start(tiny_sd, tmp_path, monkeypatch):
    def full(self: Latent, *_: Any) -> None:
        raise SafetensorError(FULL)

    with monkeypatch.context() as patch:
        patch.setattr(Latent, "export", full)
        with pytest.raises(SystemExit) as end, cli_errors():
            running.run(sd(tmp_path / "run", tiny_sd, "run.steps=1"))
    assert end.value.code == 2 and not (tmp_path / "run" / "student").exists()
    running.run(sd(tmp_path / "run", tiny_sd, "run.steps=1"))
    assert RunDirectory(tmp_path / "run").exported() == 1
    # And weights that are not finite never leave.
    made = Exported.of(sd(tmp_path / "run", tiny_sd, "run.steps=1"), "latest")
    next(made.student.parameters()).data.view(-1)[0] = torch.nan
    with pytest.raises(UserError, match=r"student of step 1 is not exported: its weight .* is not finite"):
        export.write(made.family, made.student, tmp_path / "poisoned", made.card)
    assert not (tmp_path / "poisoned").exists()


def test_a_place_that_cannot_be_written_to_is_a_sentence(tmp_path, monkeypatch, capsys):
    def locked(*_: Any, **__: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    running.run(toy(tmp_path / "run", "run.steps=1"))
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", locked)
        with pytest.raises(
            UserError, match=r"cannot be written to \(Read-only file system\); choose another"
        ):
            running.run(toy(tmp_path / "run", "run.steps=2"))
        with pytest.raises(SystemExit) as end, cli_errors():
            locked()
    assert end.value.code == 2 and "cannot be written or read (Read-only" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["measure", "preview", "record_best", "_finish"])
def test_what_a_kill_prevented_after_a_save_is_made_up_for(what, tmp_path, monkeypatch):
    settings = ("run.metric=sw1", "run.metric_every=2", "run.preview_every=4", "run.log_every=1")
    running.run(toy(tmp_path / "whole", *settings))
    owner = {"record_best": RunDirectory, "_finish": running}.get(what, Monitor)
    original = getattr(owner, what)

    def killed(self: Any, *given: Any) -> None:
        step = self.state.step if what in ("measure", "preview") else given[0]
        if what == "_finish" or step == 4:
            raise Interrupted
        original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, killed)
        with pytest.raises(KeyboardInterrupt):
            running.run(toy(tmp_path / "halves", *settings))
    assert RunDirectory(tmp_path / "halves").latest() == (6 if what == "_finish" else 4)
    running.run(toy(tmp_path / "halves", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    whole, halves = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "halves")
    assert whole.best() == halves.best()
    pictures = [
        {path.name: path.read_bytes() for path in each.previews.iterdir()} for each in (whole, halves)
    ]
    assert pictures[0] == pictures[1] and set(pictures[0]) == {"0000000.png", "0000004.png"}


def test_a_run_without_an_export_is_finished_when_its_metrics_are_there(tmp_path, monkeypatch):
    """Killed between its last checkpoint and its family's own metrics, it has something left to do, once."""
    running.run(toy(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(running, "_finish", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(KeyboardInterrupt):
            running.run(toy(tmp_path / "halves"))
    for _ in range(2):
        running.run(toy(tmp_path / "halves"))
        assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")


def test_processes_and_threads_for_another_machine_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"1000 processes were started, one for each GPU.*2cpu\.yaml"):
        launch.check_processes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch.check_processes()
    with pytest.raises(ValueError, match="threads must be at most"):
        RunConfig(steps=1, out="runs/x", threads=100_000)
    with pytest.raises(UserError, match="another process of this run has ended"), launch.peers(2):
        raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError), launch.peers(1):
        raise RuntimeError("Connection closed by peer")


def test_what_two_runs_need_is_computed_by_one_of_them(tmp_path, monkeypatch, capsys):
    """The second neither removes what the first is writing nor computes beside it; a crash frees its place."""
    shards = Shards(tmp_path, "things", {"a": 1}, 4, rows=2)
    shards.directory.mkdir()
    (shards.directory / ".000000.safetensors.xyz").mkdir()
    ready, child = os.pipe(), os.fork()
    if child == 0:
        held = Lock(shards.directory / ".lock")
        os.write(ready[1], b"1" if held.take() else b"0")
        signal.alarm(60)
        signal.pause()
        os._exit(0)
    assert os.read(ready[0], 1) == b"1"

    def gone(_: float) -> None:
        assert (shards.directory / ".000000.safetensors.xyz").exists()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    monkeypatch.setattr(lock.time, "sleep", gone)
    shards.fill(lambda numbers: {"x": torch.tensor(list(numbers))}, progress=False)
    assert "warning W10" in capsys.readouterr().err
    assert shards.rows([3])["x"].tolist() == [3] and not list(shards.directory.glob(".0*"))


def test_who_is_trained_in_ten_million_steps_is_known_at_once():
    class Late(Method):
        looked = 0

        def phases(self, step: int) -> Any:
            Late.looked += 1
            yield Phase("student", ("student",), ())
            if step % 1000 == 999:
                yield Phase("critic", ("rare",), ())
            if step > 9_990_000 and step % 500 == 0:
                yield Phase("late", ("late",), ())

    assert trained_by(Late(SimpleNamespace()), 10**7) == ["late", "rare", "student"]
    assert Late.looked <= 10**5
    assert trained_by(Late(SimpleNamespace()), 10) == ["student"]
