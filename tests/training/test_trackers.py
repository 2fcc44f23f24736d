"""What a run writes down: every step once, in metrics.jsonl and in TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import toy

from stepdistill.errors import UserError
from training import run as running
from training.trackers import JsonlTracker, log_picture, trackers


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonlTracker(path)
    log.start()
    for step in (0, 10, 20, 30):
        log.log({"student/loss": step / 10, "bad": math.nan}, step)
    log.finish()
    with open(path, "a") as file:
        # Killed while writing.
        file.write('{"step": 40, "stu')
    log = JsonlTracker(path, start_step=20)
    log.start()
    log.log({"student/loss": torch.tensor(9.0)}, 30)
    # Flushed before closing.
    assert [line["step"] for line in read(path)] == [0, 10, 20, 30]
    assert read(path)[-1] == {"step": 30, "student/loss": 9.0} and read(path)[0]["bad"] is None
    log.finish()
    fresh = JsonlTracker(path)
    fresh.start()
    fresh.finish()
    assert read(path) == []


def test_tensorboard_gets_numbers_and_pictures_where_it_is_installed(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (8, 6), "red").save(tmp_path / "p.png")
    made = trackers(tmp_path, ("tensorboard",))
    assert [each.name for each in made] == ["jsonl", "tensorboard"]
    for each in made:
        each.start()
        each.log({"student/loss": 0.5}, 1)
    log_picture(made, "preview", tmp_path / "p.png", 1)
    for each in made:
        each.finish()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "student/loss": 0.5}]
    written = events.EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [(e.step, e.value) for e in written.Scalars("student/loss")] == [(1, 0.5)]
    picture = written.Images("preview")[0]
    assert (picture.width, picture.height) == (8, 6)


def test_a_tracker_that_is_not_installed_is_found_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("training.trackers.is_wandb_available", lambda: False)
    with pytest.raises(UserError, match=r"run\.trackers names wandb, which is not installed"):
        running.build(toy(tmp_path / "run", "run.trackers=[wandb]"))
    assert not (tmp_path / "run").exists()
