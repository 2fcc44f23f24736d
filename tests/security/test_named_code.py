"""No file makes code run: what a recipe, a card, a pipeline directory or a protocol names is looked up,
not imported.

Each canary would leave a file behind if it ran; the test is that there is none, and one sentence instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from canaries import CANARY, Bomb, refusal

import stepdistill
from evaluation.metrics import METRICS
from stepdistill.config import dump
from stepdistill.errors import UserError
from stepdistill.eyes import EYES
from stepdistill.families import FAMILIES
from stepdistill.methods import METHODS
from stepdistill.registry import allowing_code, resolve
from stepdistill.rewards import REWARDS
from training.data import DATA
from training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "family": FAMILIES,
    "method": METHODS,
    "data": DATA,
    "metric": METRICS,
    "eye": EYES,
    "reward": REWARDS,
}


def toy(out: Path, **sections: Any) -> dict[str, Any]:
    base = {"family": "toy", "method": "dmd2", "data": "toy", "run": {"steps": 1, "out": str(out)}}
    return base | sections


# -------------------------------------------------------------------------------------------- registered names


@pytest.mark.parametrize("what", TABLES)
def test_nothing_outside_a_table_is_imported_unless_allowed(canary: Path, what: str) -> None:
    said = refusal(resolve, "canary:X", TABLES[what], what, where=f"the {what}")
    assert f"the {what} 'canary:X' would import the module canary and run its class X" in said
    assert "--allow-code" in said and not canary.exists()
    with allowing_code():
        said = refusal(resolve, "canary:X", TABLES[what], what, registered_only=True)
    assert "would import the module canary" in said and "--allow-code" not in said and not canary.exists()


@pytest.mark.parametrize("what", TABLES)
def test_what_is_allowed_is_still_of_its_kind(what: str) -> None:
    """Every registered class is, and a class of another kind is never made."""
    for name in TABLES[what]:
        resolve(name, TABLES[what], what)
    with allowing_code():
        said = refusal(resolve, "subprocess:Popen", TABLES[what], what)
        assert f"Popen is no {what}" in said and "derive it from" in said
        for kind, table in TABLES.items():
            if kind != what:
                refusal(resolve, next(iter(table.values())), TABLES[what], what)


def test_permission_ends_with_its_block(canary: Path) -> None:
    with pytest.raises(RuntimeError), allowing_code():
        raise RuntimeError
    refusal(resolve, "canary:X", EYES, "eye")
    with allowing_code(), allowing_code(False):
        refusal(resolve, "canary:X", EYES, "eye")
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["", ":", "a:", ":B", ".a:B", "a b:C", "a:B.c", "../x:Y", "a\n:B", None, 3, ["a:B"], {}]
)
def test_what_is_no_name_is_said_to_be_unknown(name: Any) -> None:
    with allowing_code():
        assert f"unknown eye {name!r}" in refusal(resolve, name, EYES, "eye")


NAMED = {
    "family.name": {"family": "canary:X"},
    "method.name": {"method": "canary:X"},
    "data.name": {"data": "canary:X"},
    "method.eye": {"method": {"name": "add", "eye": "canary:X"}},
    "method.reward": {"method": {"name": "reward", "reward": "canary:X"}},
    "method.base.name": {"method": {"name": "disback", "base": {"name": "canary:X"}}},
    "method.parts.1.name": {"method": {"name": "compose", "parts": [{"name": "sim"}, {"name": "canary:X"}]}},
    "stages.0": {"stages": [{"method": "canary:X", "run": {"steps": 1}}]},
}


@pytest.mark.parametrize("field", NAMED)
def test_a_recipe_runs_no_code(canary: Path, tmp_path: Path, capsys: Any, field: str) -> None:
    from training import export
    from training.train import main

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy(tmp_path / "run", **NAMED[field])))
    (tmp_path / "run").mkdir()
    # As a run writes it, where its names are known at all when the recipe is read.
    whole = path.read_text()
    with contextlib.suppress(UserError):
        whole = dump(load_recipe(path))
    (tmp_path / "run" / "recipe.yaml").write_text(whole)
    for command, options in (
        (main, [str(path), "--dry-run"]), (main, [str(path)]), (export.main, [str(tmp_path / "run")])
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            command(options)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1
        assert f"{field}" in said and "would import the module canary and run its class X" in said
    assert not canary.exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_process_that_a_recipe_names_is_never_started(tmp_path: Path, capsys: Any) -> None:
    """With --allow-code neither: Popen is no eye."""
    from training.train import main

    trace = tmp_path / "ran"
    method = {"name": "add", "eye": "subprocess:Popen", "arguments": {"args": ["touch", str(trace)]}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy(tmp_path / "run", method=method)))
    for options, says in (([], "--allow-code"), (["--allow-code"], "Popen is no eye; derive it from")):
        with pytest.raises(SystemExit) as ended:
            main([str(path), "--dry-run", *options])
        assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not trace.exists()


def test_the_command_line_allows_a_class_of_ones_own(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """From another directory, as a person would; and going on with the run needs the permission again."""
    from training.train import main

    (tmp_path / "own.py").write_text("from stepdistill.methods.sim import SIM\nclass Mine(SIM):\n    pass\n")
    # Few steps, as the run ends with a measurement.
    short = {"family": {"name": "toy", "fit_steps": 1}, "student": {"steps": [1]}}
    recipe = toy(tmp_path / "run", method="own:Mine", **short)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    command = [sys.executable, "-m", "training.train", "recipe.yaml", "--allow-code"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["method"]["name"] == "own:Mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run/recipe.yaml"])
    assert ended.value.code == 2 and "own" not in sys.modules
    assert "would import the module own and run its class Mine" in capsys.readouterr().err
    main(["run/recipe.yaml", "--allow-code"])
    assert "finished" in capsys.readouterr().err
    del sys.modules["own"]


# -------------------------------------------------------------------------------------------------------- cards


def student(tmp_path: Path, source: Path, card: Any) -> Path:
    path = tmp_path / "downloaded"
    shutil.copytree(source, path)
    (path / "stepdistill.json").write_text(json.dumps(card))
    return path


@pytest.mark.parametrize("family", ["canary:X", "downloaded.payload:X", "subprocess:Popen"])
def test_a_card_runs_no_code(canary: Path, tmp_path: Path, tiny_sd: Path, family: str) -> None:
    """Not even where code is allowed: the permission is for what a person named."""
    path = student(tmp_path, tiny_sd, {"family": family})
    trace = tmp_path / "payload ran"
    (path / "payload.py").write_text(CANARY.format(trace=str(trace), made=str(trace)))
    said = refusal(stepdistill.load, path)
    assert "stepdistill.json: family" in said and "would import the module" in said
    with allowing_code():
        refusal(stepdistill.load, path)
    assert not canary.exists() and not trace.exists()


@pytest.mark.parametrize("family", [3, ["sd"], {"name": "sd"}, "sd.py"])
def test_a_card_with_no_family_name_is_refused(tmp_path: Path, tiny_sd: Path, family: Any) -> None:
    said = refusal(stepdistill.load, student(tmp_path, tiny_sd, {"family": family}))
    assert "unknown family" in said or "stepdistill.json.family: expected text" in said


# --------------------------------------------------------------------------------------------------- evaluation


def test_a_metric_of_ones_own_needs_permission(canary: Path, tmp_path: Path, capsys: Any) -> None:
    from evaluation.__main__ import main

    command = ["images", str(tmp_path), "--ref", str(tmp_path), "--metrics", "canary:X"]
    run = ["run", "--pipeline", str(tmp_path), "--out", str(tmp_path / "out"), "--metrics", "canary:X"]
    for arguments in (command, run):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        capsys.readouterr()
    assert not canary.exists()


# --------------------------------------------------------------------------------------------------- data files


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/name:os.system", "python/module:canary"]
)
def test_a_yaml_tag_makes_nothing(canary: Path, tmp_path: Path, tag: str) -> None:
    from evaluation.protocol import load_protocol
    from stepdistill.config import apply_overrides
    from stepdistill.yaml_files import read_yaml

    path = tmp_path / "x.yaml"
    path.write_text(f"a: !!{tag} ['touch {canary}']\n")
    assert "not valid YAML" in refusal(read_yaml, path)
    assert str(path) in refusal(load_protocol, path)
    assert "cannot read" in refusal(apply_overrides, {}, [f"a=!!{tag} ['touch {canary}']"])
    assert not canary.exists()


def test_statistics_are_not_unpickled(tmp_path: Path) -> None:
    import numpy as np

    from evaluation.stats import FeatureStats

    trace, path = tmp_path / "ran", tmp_path / "ref.npz"
    np.savez(path, mu=np.array([Bomb(trace)], dtype=object), sigma=np.eye(1))
    refusal(FeatureStats.load, path)
    assert not trace.exists()


def test_a_checkpoint_of_tensors_is_all_that_is_read(tmp_path: Path) -> None:
    import pickle

    import torch

    from evaluation.weights import load_file

    trace = tmp_path / "ran"
    torch.save({"x": Bomb(trace)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Bomb(trace)))
    for name in ("a.pth", "b.pth"):
        assert name in refusal(load_file, tmp_path / name)
    assert not trace.exists()
