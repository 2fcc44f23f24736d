"""What a student directory says of itself: written and read by one format, and the one before still read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stepdistill import card as cards
from stepdistill import load
from stepdistill.card import Card
from stepdistill.errors import UserError
from stepdistill.sampling import Sampling

# As versions before 0.2 wrote it.
FORMAT_1 = {
    "format": 1, "kind": "student", "name": "old", "family": "sd", "method": "tscd", "rule": "tcd", "eta": 0.3,
    "init_noise": "unit", "first_rho": 2.5, "extras": [], "guidance_free": True, "guidance_scale": 1.0,
    "teacher": "t", "recipe": {"run": {"steps": 3}}, "commit": "abc", "steps": [1, 4], "finest": 4,
    "timesteps": {"1": [623.0], "4": [623.0, 467.0, 311.0, 155.0]}, "step": 3, "weights": "ema",
}  # fmt: skip


def written(folder: Path, content: object) -> Path:
    (folder / cards.NAME).write_text(json.dumps(content))
    return folder


def test_a_card_survives_a_round_trip(tmp_path):
    card = Card(
        "student", "mine", "sd", "dmd2", Sampling((1, 2), first_rho=2.5), {"1": (623.0,), "2": (623.0, 311.0)},
        "teacher", {"run": {"steps": 1}}, 0, "ema", {"by": "class", "of": 2, "part": 1, "blocks": [[0, 5]]},
    )  # fmt: skip
    cards.write(card, tmp_path)
    assert cards.read(tmp_path) == card and cards.required(tmp_path) == card
    assert json.loads((tmp_path / cards.NAME).read_text())["format"] == 2


def test_the_first_format_is_read_as_what_it_said(tmp_path):
    card = cards.read(written(tmp_path, FORMAT_1))
    assert card.sampling == Sampling((1, 4), "tcd", 2.5, eta=0.3, finest=4)
    assert (card.kind, card.name, card.step, card.weights) == ("student", "old", 3, "ema")
    assert card.timesteps["4"] == (623.0, 467.0, 311.0, 155.0)
    lcm = FORMAT_1 | {"rule": "renoise", "extras": ["guidance"], "guidance_free": False, "guidance_scale": 9}
    told = cards.read(written(tmp_path, lcm)).sampling
    assert (told.inputs, told.guidance, told.scale) == (("guidance",), "input", 9.0)
    # A card that names no scale had none.
    assert cards.read(written(tmp_path, FORMAT_1 | {"guidance_scale": None})).sampling.scale == 1.0
    teacher = {"format": 1, "kind": "teacher", "rule": "ode", "guidance_free": False, "guidance_scale": 3.0}
    assert cards.read(written(tmp_path, teacher)).sampling == Sampling((), "ode", guidance="cfg", scale=3.0)


def test_a_directory_without_a_card_has_none(tmp_path):
    assert cards.read(tmp_path) is None
    with pytest.raises(UserError, match=r"is no student directory: it has no readable stepdistill\.json"):
        cards.required(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "is of format 3, and this version reads up to 2; update stepdistill"),
        ({"format": 2, "sampling": {"steps": [0]}}, "must list whole numbers of at least 1"),
        ({"format": 2, "sampling": {"rule": "euler"}}, "expected one of renoise, ode, tcd, flowmap"),
        ({"format": 2, "timesteps": {"2": [1.0]}}, "timesteps must list n times for n steps"),
        (
            {"format": 2, "kind": "students", "students": ["1", "../2"]},
            "must name numbered folders, got '../2'",
        ),
        ({"format": 2, "kind": "students", "students": ["."]}, "must name numbered folders, got '.'"),
        ({"format": 2, "kind": "students", "students": ["/etc"]}, "must name numbered folders, got '/etc'"),
        ({"format": 2, "wheels": 4}, "unknown key"),
        ([1], "is not a JSON object"),
    ],
)
def test_what_no_card_says_is_one_sentence(tmp_path, change, said):
    with pytest.raises(UserError) as error:
        cards.read(written(tmp_path, change))
    assert said in str(error.value) and "\n" not in str(error.value) and cards.NAME in str(error.value)


def test_merged_students_do_not_nest(tmp_path, tiny_sd):
    outer = written(tmp_path, {"format": 2, "kind": "students", "students": ["1"]})
    shutil.copytree(tiny_sd, outer / "1")
    with pytest.raises(UserError, match="is no student directory"):
        load(outer)
    written(outer / "1", {"format": 2, "kind": "students", "students": ["1"]})
    with pytest.raises(UserError, match="holds merged students itself; merge single students"):
        load(outer)
