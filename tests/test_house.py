"""The house stays readable: no file over 350 lines, no function over 60, and no comment behind code."""

from __future__ import annotations

import ast
import io
import itertools
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("stepdistill", "training", "evaluation", "app")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# The analytic scenes: what draws a shape stands beside what reads it back.
LONG = {"stepdistill/scenes.py"}
# What a linter is told stands where it must.
DIRECTIVES = ("# noqa", "# fmt:", "# type:", "# pragma")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_few_screens(path):
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    assert text.count("\n") <= 350 or name in LONG
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {function: length for function, length in lengths.items() if length > 60} == {}
    lines = text.split("\n")
    behind = [
        lines[token.start[0] - 1].strip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
        and lines[token.start[0] - 1][: token.start[1]].strip()
        and not token.string.startswith(DIRECTIVES)
    ]
    assert behind == []


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their names alone."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, after in itertools.pairwise(names) if name == after]
