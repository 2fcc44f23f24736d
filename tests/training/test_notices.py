"""Every warning of a run has a code, and docs/warnings.md says of each what it comes from and what helps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import soak_table

from stepdistill.methods import METHODS
from stepdistill.methods.base import COMMON_HEALTH
from stepdistill.registry import resolve
from training.notices import CODES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "warnings.md").read_text()


def test_the_page_has_every_code_with_cause_and_cure():
    parts = re.split(r"^## ", PAGE, flags=re.M)[1:]
    assert [part[:3] for part in parts] == sorted(CODES)
    for part in parts:
        assert "Cause" in part and "ure" in part.split("Cause", 1)[1], part[:3]


def test_every_code_is_said_somewhere_and_no_other():
    source = "".join(path.read_text() for path in (ROOT / "training").rglob("*.py"))
    said = set(re.findall(r'(?:warn|notice)\(\s*"(\w+)"', source))
    assert said == set(CODES)
    # None goes past the codes.
    assert not re.findall(r'"warning[: ]', source.replace('f"warning {code}', ""))


def test_the_page_names_every_value_that_is_watched():
    values = set(COMMON_HEALTH)
    for name in METHODS:
        values |= set(resolve(name, METHODS, "method").health)
    assert {value for value in values if f"`{value}`" not in PAGE} == set()


def test_the_table_of_faults_is_that_of_the_soak():
    result = json.loads(soak_table.RESULT.read_text())
    page = soak_table.PAGE.read_text()
    assert soak_table.placed(page, result) == page, "python tests/soak_table.py puts them there"
    assert result["totals"]["different"] == 0 and result["totals"]["kills"] >= 300
    assert result["totals"]["flipped_bits_found"] == result["totals"]["flipped_bits"]
