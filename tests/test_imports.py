"""app -> stepdistill <- evaluation; training -> stepdistill, and -> evaluation inside functions only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("stepdistill", "training", "evaluation", "app")
ALLOWED = {
    "stepdistill": {"stepdistill"},
    "training": {"training", "stepdistill"},
    "evaluation": {"evaluation", "stepdistill"},
    "app": {"app", "stepdistill"},
}
LAZILY = {"training": {"evaluation"}}
NEVER_IN_THE_LIBRARY = {"gradio", "accelerate"}
LAZY_IN_THE_LIBRARY = {"transformers", "diffusers", "peft", "xformers"}


def imports(tree: ast.AST, package: str, inside: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(top-level package, whether inside a function, line) of every import but those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], inside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (package if node.level else node.module.split(".")[0]), inside, node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value).split(".")[0], inside, node.lineno
            yield from imports(node, package, inside)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, package, inside or function)


def offences(source: str, package: str) -> list[str]:
    found = []
    for name, inside, line in imports(ast.parse(source), package):
        foreign = name in PACKAGES and name not in ALLOWED[package]
        if foreign and not (inside and name in LAZILY.get(package, ())):
            found.append(f"line {line}: {package} imports {name}")
        if package == "stepdistill" and (
            name in NEVER_IN_THE_LIBRARY or (name in LAZY_IN_THE_LIBRARY and not inside)
        ):
            found.append(f"line {line}: {name} at the top of a module of the library")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)} {offence}"
        for path in files
        for offence in offences(path.read_text(encoding="utf-8"), package)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("package", "source", "count"),
    [
        ("stepdistill", "import training.data", 1),
        ("stepdistill", "def f():\n    from evaluation import stats", 1),
        ("stepdistill", "class A:\n    import gradio", 1),
        ("stepdistill", "from diffusers import UNet2DModel", 1),
        ("stepdistill", "def f():\n    from diffusers import UNet2DModel", 0),
        ("stepdistill", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers", 0),
        ("stepdistill", "import importlib\ndef f():\n    importlib.import_module('training.data')", 1),
        ("training", "try:\n    import evaluation\nexcept ImportError:\n    pass", 1),
        ("training", "def f():\n    import evaluation\n    import app", 1),
        ("evaluation", "from . import stats\nimport stepdistill", 0),
        ("app", "from training import recipe", 1),
    ],
)
def test_the_rule_finds_offences(package: str, source: str, count: int) -> None:
    assert len(offences(source, package)) == count


def test_importing_the_library_stays_light() -> None:
    heavy = (
        "gradio",
        "transformers",
        "accelerate",
        "diffusers",
        "peft",
        "pyarrow",
        "training",
        "evaluation",
        "app",
    )
    code = f"import sys, stepdistill; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, module: str, known: set[str]) -> Iterator[str]:
    """Modules of `known` that `module` imports when it is itself imported: not in a function, not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            yield from inner
            # A package is asked only for what is no module of it.
            if len(inner) < len(node.names) and node.module in known:
                yield node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imported_modules(node, module, known)


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of two or more modules each of which comes to import all others of its set (or itself)."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        todo, seen = list(graph[start]), set()
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo += graph[module]
        reached[start] = seen
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }


def test_no_modules_import_each_other() -> None:
    files = {module_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    graph = {
        module: set(imported_modules(ast.parse(path.read_text(encoding="utf-8")), module, set(files)))
        for module, path in files.items()
    }
    assert circles(graph) == set()


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()
    known = {"p", "p.a", "p.b"}
    source = "from p import a, thing\nif TYPE_CHECKING:\n    import p.b\ndef f():\n    import p.b"
    assert set(imported_modules(ast.parse(source), "p.b", known)) == {"p", "p.a"}
