"""Images that go away while a run reads them: it goes on, says so, and a later start says what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import checkpoint, labelled_images, pixel

from stepdistill.errors import UserError
from training import batches
from training.run import run
from training.trainer import Trainer


@pytest.fixture
def removing(monkeypatch: pytest.MonkeyPatch):
    """Removes files of a folder once the first iteration is over."""

    def remove(images: Path, count: int) -> None:
        original = Trainer.train_step

        def train_step(self: Trainer) -> None:
            if self.state.step == 1:
                for path in sorted(images.rglob("*.png"))[:count]:
                    path.unlink(missing_ok=True)
            original(self)

        monkeypatch.setattr(Trainer, "train_step", train_step)

    return remove


def recipe(out: Path, teacher: Path, images: Path, *overrides: str):
    return pixel(out, teacher, images, "data.memory_gb=0", "method.gan_weight=0.1", "run.steps=4", *overrides)


def test_a_run_goes_on_and_the_next_start_says_what_is_gone(
    tmp_path, tiny_pixel, removing, capsys: pytest.CaptureFixture[str]
) -> None:
    images = labelled_images(tmp_path / "images")
    removing(images, 2)
    run(recipe(tmp_path / "run", tiny_pixel, images))
    said = capsys.readouterr().err
    assert "data folder" in said and "12 images at 8x8" in said
    assert said.count("is left out from now on") == 2 and "missing file" in said
    assert checkpoint(tmp_path / "run").step == 4
    run(recipe(tmp_path / "run", tiny_pixel, images, "run.steps=5"))
    said = capsys.readouterr().err
    assert "the data are not those of the checkpoint" in said
    assert "12 images at 8x8" in said and "10 images at 8x8" in said


def test_too_many_end_it_with_what_it_has_learnt(tmp_path, tiny_pixel, removing, monkeypatch) -> None:
    monkeypatch.setattr(batches, "LOST", 1)
    images = labelled_images(tmp_path / "images")
    removing(images, 6)
    with pytest.raises(UserError, match=r"[2-6] of 12 examples can no longer be read"):
        run(recipe(tmp_path / "run", tiny_pixel, images, "run.save_every=0"))
    assert checkpoint(tmp_path / "run").step == 2
