"""The table of the toy: trials of a setting stand apart from recipes, and a wrong setting is one sentence."""

from __future__ import annotations

import sys

import pytest

from benchmarks import toy

ROW = {"schedule": "vp", "guidance": 1.0, "sw1": {"1": 2.0, "4": 1.5}, "shares": {"1": 0.1}, "trace": {"1": 0.1},
       "modes": {"1": 8}, "cpu_seconds": 30.0, "iterations": 100}  # fmt: skip


def test_trials_stand_in_a_table_of_their_own():
    setting = "method.link_weight=uniform"
    rows = {"cd": ROW, f"cd?{setting}": ROW | {"settings": [setting]}, "cd/edm": ROW | {"schedule": "edm"}}
    shipped, others, trials = toy.markdown(rows).strip().split("\n\n**")
    assert shipped.count("| cd |") == 1 and setting not in shipped + others
    assert trials.startswith("Trials") and f"| cd, `{setting}` | vp | 2.00 |  | 1.50 |" in trials


def test_a_setting_that_is_none_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", "cd", "--set", "method.link_wieght=uniform"])
    with pytest.raises(SystemExit) as end:
        toy.main()
    assert end.value.code == 2 and "did you mean method.link_weight?" in capsys.readouterr().err
