"""docs/choosing.md: every figure in a sentence is in the file that the sentence names, of a method that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fair import VARIANTS
from stepdistill.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "choosing.md"
FILE = re.compile(r"\]\(\.\./([\w/]+\.json)\)")
# What is a measurement: a number with a point, a share, a number of MiB or of seconds.
FIGURE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)? %|[\d,]+ MiB|\d[\d,]*\.\d+)")
NAME = re.compile(r"`([a-z_0-9+, ]+)`")


def sentences(text: str) -> Iterator[str]:
    """Of the prose, on one line each."""
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", text):
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(paragraph.split()))


def rows(file: str, names: set[str]) -> list[Any]:
    """What a file has of methods of these names."""
    content = json.loads((ROOT / file).read_text())
    if "students" in content:
        content = content["students"]
    if isinstance(content.get("rows"), list):
        return [
            row
            for row in content["rows"]
            if row.get("method") in names or row.get("name", row.get("role")) in names
        ]
    return [row for name, row in content.items() if re.split(r"[/+,]", name)[0] in names or name in names]


def figures(node: Any) -> Iterator[str]:
    """Every number as it may be written."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from figures(value)
            if isinstance(value, int | float) and key == "cpu_seconds":
                yield f"{value / 60:.1f}"
            if isinstance(value, int | float) and key == "peak_mib":
                yield f"{value:,.0f} MiB"
    elif isinstance(node, list):
        for value in node:
            yield from figures(value)
    elif isinstance(node, int | float):
        yield from (f"{node:.2f}", f"{node:.1f}", f"{100 * node:.1f} %")


def wrong(text: str) -> list[tuple[str, str]]:
    """Figures that are in none of the files a sentence names, with the sentence."""
    found = []
    for sentence in sentences(text):
        files, names = FILE.findall(sentence), set(NAME.findall(sentence))
        known = {figure for file in files for row in rows(file, names) for figure in figures(row)}
        found += [(figure, sentence) for figure in FIGURE.findall(sentence) if figure not in known]
    return found


def test_every_figure_is_in_the_file_it_names():
    text = PAGE.read_text()
    assert wrong(text) == []
    assert len(FIGURE.findall(text)) > 20


def test_every_name_is_of_a_method_or_a_recipe():
    named = {name for name in NAME.findall(PAGE.read_text()) if "_" in name or name in METHODS}
    recipes = {path.stem for path in (ROOT / "training" / "recipes").glob("*.yaml")}
    # Students of the file that has one method's.
    several = json.loads((ROOT / "benchmarks" / "cdm_steps.json").read_text())["rows"]
    settings = {
        "diversity_weight",
        "tell_place",
        "student_every",
        *VARIANTS,
        *(row["name"] for row in several),
    }
    for name in named:
        assert name in METHODS or name in recipes or f"scenes_{name}" in recipes or name in settings, name


@pytest.mark.parametrize("figure", ["0.97", "89.4 %", "116.2"])
def test_a_figure_that_is_not_there_is_found(figure):
    file = "([embedded.json](../benchmarks/embedded.json))"
    assert not wrong(f"In one step `dmd2` is at 0.96 and gets 89.3 % right after 116.1 minutes {file}.")
    assert [each for each, _ in wrong(f"In one step `dmd2` is at {figure} {file}.")] == [figure]
    # Another method's, and another file's.
    assert wrong(f"In one step `sim` is at 0.96 {file}.")
    assert wrong("In one step `dmd2` is at 0.96 ([toy.json](../benchmarks/toy.json)).")
