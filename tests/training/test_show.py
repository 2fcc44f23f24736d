"""A run directory explains itself."""

from __future__ import annotations

import shutil

import pytest
from runs import toy

from training import run as running
from training import show
from training.lock import Lock

pytestmark = pytest.mark.usefixtures("short_runs")


def test_a_run_is_shown_while_it_stands_and_when_it_is_over(tmp_path, capsys):
    out = tmp_path / "run"
    running.run(toy(out, "run.metric=sw1", "run.metric_every=2", "run.log_every=1"))
    capsys.readouterr()
    show.main([str(out)])
    said = capsys.readouterr().out
    for part in (
        "state   finished",
        "6 of 6 (100%)",
        "critic/total",
        "student/x0_std_ratio",
        "sw1 =",
        "checkpoints of",
    ):
        assert part in said
    # Made longer: what is left is told by the speed of what was done.
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace("steps: 6", "steps: 6000"))
    shutil.rmtree(out / "checkpoints" / "6")
    show.main([str(out)])
    said = capsys.readouterr().out
    assert "not at work; the same command goes on from step 4" in said and "left    about" in said
    held = Lock(out / ".lock")
    assert held.take()
    show.main([str(out)])
    assert "at work (process" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        show.main([str(tmp_path)])
    assert "is no run directory" in capsys.readouterr().err
