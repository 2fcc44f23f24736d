"""The fair comparison: what a budget buys, what is done again, and what the table says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import fair, fair_table, students
from benchmarks.budget import budgeted, lengths, parts_of, resized, served
from benchmarks.metered import account
from stepdistill.errors import Interrupted
from training.recipe import recipe_from

STAGED = {
    "student": {"steps": [1, 2]},
    "data": {"name": "scenes"},
    "optim": {"warmup_steps": 20, "lr": 1e-3},
    "run": {"out": "x"},
    "stages": [
        {"method": {"name": "a", "warmup": 0, "double_every": 30}, "run": {"steps": 100}},
        {
            "method": {"parts": [{"warmup": 50}, {"warmup": 1}]},
            "student": {"steps": [4]},
            "run": {"steps": 300},
        },
    ],
}


def test_stages_keep_their_proportions_and_end_with_the_budget():
    counts = budgeted(1010.0, 10.0, [0.5, 2.0], [100, 300])
    assert counts == [154, 462]
    assert abs(10 + 154 * 0.5 + 462 * 2.0 - 1010) < 2
    # What starts later than the budget ends still runs.
    assert budgeted(5.0, 10.0, [0.5, 2.0], [100, 300]) == [1, 1]


def test_what_is_counted_in_iterations_goes_with_them():
    longer = resized(STAGED, [200, 600])
    assert lengths(longer) == [200, 600] and longer["optim"] == {"warmup_steps": 40, "lr": 1e-3}
    assert longer["stages"][0]["method"] == {"name": "a", "warmup": 0, "double_every": 60}
    assert longer["stages"][1]["method"]["parts"] == [{"warmup": 100}, {"warmup": 2}]
    shorter = resized(STAGED, [1, 600])
    assert shorter["stages"][0]["method"]["double_every"] == 1
    assert shorter["stages"][1]["method"]["parts"][0] == {"warmup": 100}
    assert lengths(STAGED) == [100, 300] and STAGED["optim"]["warmup_steps"] == 20
    assert served(STAGED) == [4] and served({**STAGED, "stages": STAGED["stages"][:1]}) == [1, 2]
    assert parts_of(STAGED) == 1 and parts_of({"data": {"partition": "1/2"}}) == 2


@pytest.mark.parametrize("name", fair.chosen(None))
def test_a_resized_recipe_is_a_recipe(name):
    mapping = fair.recipe_of(name)
    counts = [3 * count for count in lengths(mapping)]
    recipe = recipe_from(resized(mapping, counts))
    assert [stage.run.steps for stage in recipe.stages()] == counts
    assert set(served(mapping)) & set(fair_table.COLOURS)
    assert min(recipe.stages()[-1].student.steps) == min(served(mapping))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "sidda"], "there is no method 'sidda' here. Did you mean 'sida'?"),
        (["--only", "teacher"], "there is no method 'teacher' here."),
        (["--minutes", "0"], "--minutes must be above 0, got 0."),
        (["--minutes", "nan"], "--minutes must be above 0, got nan."),
        (["--n", "8"], "--n must be at least 16, got 8."),
    ],
)
def test_what_is_wrong_is_one_sentence(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        fair.main([*words, "--runs", str(tmp_path), "--table", str(tmp_path / "t.json")])
    printed = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(printed) == 1 and said in printed[0]
    assert not list(tmp_path.iterdir())


class Runs:
    """Stands for what `students.spend` runs: an iteration takes 2 CPU seconds after 10 that everything begins with."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stops, self.slowed = False, 1.0

    def __call__(
        self, module: str, words: Any, *, cwd: Path, account: Path | None = None, compared: bool = False
    ) -> int:
        if account is None:
            # What all have in common, once.
            assert module == "training.precompute" and not (cwd / "cache" / "latents-1").exists()
            (cwd / "cache" / "latents-1").mkdir(parents=True)
            return 0
        assert (cwd / "cache" / "latents-1").exists() and (cwd / "assets" / "teacher").exists()
        recipe, out, *_ = map(str, words)
        out = Path(out.removeprefix("run.out="))
        self.ran.append(out.parent.name)
        if self.stops and out.parent.name != "trial":
            raise Interrupted(signal.SIGINT)
        counts = lengths(yaml.safe_load(Path(recipe).read_text()))
        assert compared == (out.parent.name == "trial")
        each, plain = 2.0 * self.slowed, fair.PLAIN_SECONDS * self.slowed
        stages = {k: [n, n - 2, each * (n - 2)] for k, n in enumerate(counts)}
        stages |= {"plain": [22, 20, 20 * plain]} if compared else {}
        used = 10.0 * self.slowed + each * sum(counts) + 20 * plain * compared
        said = {"cpu_seconds": used, "peak_mib": 900.0, "stages": stages}
        students.write(account / "1.json", said)
        (out / "checkpoints" / str(sum(counts))).mkdir(parents=True)
        return 0


# What is measured of a student at one number of steps.
ONE = {
    "fd_ratio": 2.0,
    "fd_ratio/se": 0.1,
    "attributes/all": 0.5,
    "clip:scenes-v1": 79.0,
    students.DIVERSITY: 0.9,
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The command, with nothing trained and measured for it."""
    runs, asked = Runs(), []
    monkeypatch.setattr(students, "spend", runs)

    def measured(student: Path, steps: list[int], folder: Path, n: int) -> dict[str, Any]:
        asked.append((folder.name, steps, n))
        students.write(folder.parents[1] / "results" / "teacher.json", {"fd:scenes-v1": 2.5})
        return {"steps": {str(count): ONE for count in steps}}

    monkeypatch.setattr(fair, "measured", measured)

    def run(*words: str) -> dict[str, Any]:
        fair.main([*words, "--runs", str(tmp_path / "runs"), "--table", str(tmp_path / "t.json")])
        return json.loads((tmp_path / "t.json").read_text())

    run.runs, run.asked, run.folder = runs, asked, tmp_path / "runs"
    return run


def test_a_budget_is_spent(queue):
    (row,) = queue("--minutes", "30", "--only", "sida")["rows"]
    # 500 : 400 iterations, of which a trial of 12 each says 2 seconds, and 18 of all else.
    assert row["iterations"] == 495 + 396 and abs(row["planned_minutes"] - 30) < 0.1
    assert row["cpu_seconds"] == 10 + 2 * 891 and row["peak_mib"] == 900
    assert queue.runs.ran == ["trial", "sida"] and queue.asked == [("sida", [1], 1000)]
    assert not (queue.folder / "30" / "sida" / "trial").exists()


def test_a_busy_machine_takes_nothing_from_a_budget(queue):
    queue.runs.slowed = 1.7
    (row,) = queue("--minutes", "30", "--only", "sida")["rows"]
    assert row["iterations"] == 495 + 396 and abs(row["planned_minutes"] - 30) < 0.1
    assert abs(row["cpu_seconds"] - 1.7 * (10 + 2 * 891)) < 1e-6


def test_what_was_stopped_goes_on_and_what_is_there_stays(queue):
    queue.runs.stops = True
    with pytest.raises(SystemExit) as end:
        queue("--minutes", "1", "--only", "cd,sida")
    assert end.value.code == 130 and queue.runs.ran == ["trial", "cd"]
    queue.runs.stops = False
    rows = queue("--minutes", "1", "--only", "cd,sida")["rows"]
    # The trial is not repeated.
    assert queue.runs.ran == ["trial", "cd", "cd", "trial", "sida"]
    assert [(row["method"], len(row["steps"])) for row in rows] == [("cd", 3), ("sida", 1)]
    assert queue("--minutes", "1", "--only", "cd,sida")["rows"] == rows and len(queue.runs.ran) == 5
    assert len(queue("--minutes", "2", "--only", "cd")["rows"]) == 3
    for path in queue.folder.glob("*/*/row.json"):
        path.unlink()
    # Rows outlive their runs.
    assert len(queue("--report")["rows"]) == len(queue("--minutes", "2", "--only", "cd")["rows"]) == 3
    assert len(queue.runs.ran) == 7


def test_a_run_that_another_process_is_at_is_passed_over(queue, capsys):
    lock = fair.Lock(queue.folder / "1" / "cd" / "lock")
    lock.path.parent.mkdir(parents=True)
    assert lock.take()
    queue("--minutes", "1", "--only", "cd,sida")
    assert queue.runs.ran == ["trial", "sida"] and "cd: another process is at it" in capsys.readouterr().out


def test_a_method_that_cannot_run_does_not_hold_up_the_others(queue, monkeypatch, capsys):
    works = students.spend
    monkeypatch.setattr(
        students, "spend", lambda m, words, **k: 2 if k["cwd"].parent.name == "cd" else works(m, words, **k)
    )
    with pytest.raises(SystemExit) as end:
        queue("--minutes", "1", "--only", "cd,sida")
    assert end.value.code == 2 and "no student of cd;" in capsys.readouterr().err
    assert [name for name, *_ in queue.asked] == ["sida"]


def test_the_table_is_sorted_by_what_the_fewest_steps_reach(tmp_path):
    def row(method: str, minutes: float, ratio: float) -> dict[str, Any]:
        return {"method": method, "minutes": minutes, "iterations": 1234, "cpu_seconds": 598.0, "peak_mib": 1000.4,
                "steps": {"1": ONE | {"fd_ratio": ratio}, "2": ONE | {"fd_ratio": 1.0}}}  # fmt: skip

    rows = [row("a", 10, 3.0), row("b", 10, 1.5), row("a", 30, 2.0)]
    table = {"teacher": {}, "rows": rows}
    said = fair_table.markdown(table).splitlines()
    assert [line for line in said if line.startswith("**")] == [
        "**30 CPU minutes of one thread**",
        "**10 CPU minutes of one thread**",
    ]
    cells = "1.50 ± 0.10 | 1.00 ± 0.10 |  | 50.0, 50.0 | 0.90, 0.90 | 79.0, 79.0 | 10.0 | 1,000 | 1,234"
    assert f"| b | {cells} |" in said
    assert [line.split("|")[1].strip() for line in said[-2:]] == ["b", "a"]
    fair_table.plot(table, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_what_a_student_was_trained_on_does_not_judge_it():
    own = {
        name: fair_table.own_judges(students.RECIPES / f"scenes_{name}.yaml")
        for name in ("dmd2", "rdm", "reward")
    }
    assert own == {"dmd2": [], "rdm": [fair_table.CLIP], "reward": [fair_table.CLIP]}
    row = {
        "method": "rdm",
        "minutes": 10,
        "iterations": 1,
        "cpu_seconds": 6.0,
        "peak_mib": 1.0,
        "steps": {"1": ONE},
    }
    for judges, score in ((own["rdm"], "(79.0)"), (own["dmd2"], "79.0")):
        said = fair_table.markdown({"teacher": {}, "rows": [row | {"own_judges": judges}]})
        assert f"| 0.90 | {score} | 0.1 |" in said


def test_the_seeds_diversity_stands_where_one_was_measured():
    row = {"cpu_seconds": 60.0, "iterations": 10}
    plain, diverse = (
        row | {"steps": {"1": {k: v for k, v in ONE.items() if keep or k != students.DIVERSITY}}}
        for keep in (0, 1)
    )
    diverse["steps"]["1"] = diverse["steps"]["1"] | {f"{students.DIVERSITY}/se": 0.04}
    head, _, line = students.markdown([("a", plain)])
    assert "diversity" not in head and line.endswith("| 10 |")
    head, _, first, second = students.markdown([("a", plain), ("b", diverse)])
    assert head.endswith("| diversity / teacher's |")
    assert first.endswith("| 10 |  |") and second.endswith("| 10 | 0.90 ± 0.04 |")


def test_an_account_is_kept_of_a_training(tmp_path):
    recipe = students.RECIPES / "toy_dmd2.yaml"
    words = [
        recipe,
        f"run.out={tmp_path / 'run'}",
        "run.steps=5",
        "family.fit_steps=1",
        "run.preview_every=0",
    ]
    assert students.spend("training.train", words, account=tmp_path / "account") == 0
    said = account(tmp_path / "account")
    assert said["stages"]["0"][0] == 3 and 0 < said["stages"]["0"][1] < said["cpu_seconds"]
    assert said["peak_mib"] > 100


@pytest.mark.slow
def test_a_training_is_compared_with_a_plain_pass(tmp_path):
    mapping = resized(fair.recipe_of("sida"), [6, 6])
    students.write(
        tmp_path / "recipe.yaml", yaml.safe_dump(mapping | {"data": {"name": "scenes", "size": 64}})
    )
    (tmp_path / "assets").symlink_to(students.ROOT / "assets")
    words = [tmp_path / "recipe.yaml", f"run.out={tmp_path / 'run'}", "run.preview_every=0"]
    assert not students.spend("training.train", words, account=tmp_path / "a", cwd=tmp_path, compared=True)
    said = account(tmp_path / "a")["stages"]
    assert {key: count for key, (count, _) in said.items()} == {"0": 4, "1": 4, "plain": 4}
    # Two networks are trained in an iteration.
    assert all(2 * said["plain"][1] < said[key][1] for key in "01")


def test_what_nobody_waits_for_is_asked_to_end(tmp_path):
    (tmp_path / "endless.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('asked').touch(), sys.exit(0)))\n"
        "pathlib.Path('there').touch()\ntime.sleep(60)\n"
    )
    starts = (
        "import subprocess, sys, time, pathlib\n"
        "subprocess.Popen([sys.executable, '-m', 'benchmarks.metered', 'account', 'endless'])\n"
        "while not pathlib.Path('there').exists(): time.sleep(0.05)\n"
    )
    path = os.pathsep.join([str(students.ROOT), str(tmp_path)])
    subprocess.run(
        [sys.executable, "-c", starts], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True
    )
    ends = time.monotonic() + 20
    while not (tmp_path / "asked").exists() and time.monotonic() < ends:
        time.sleep(0.1)
    assert (tmp_path / "asked").exists() and account(tmp_path / "account")["cpu_seconds"] > 0
