"""make mutants: each listed change of the package, one by one, must make some test fail.

`python tests/mutants` runs what has no result yet, or survived before, and keeps the result in mutants.json. No file is
changed: each change is made to a module's text as it is imported, in a process of its own that runs the tests tied to it
until the first fails. A change that cannot be noticed, as it changes nothing, is listed as `equivalent`, with why.

    python tests/mutants [--jobs N] [--only TEXT]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULT = Path(os.environ.get("MUTANTS_RESULT", HERE / "mutants.json"))
# Of the changes, so many must be noticed.
LEAST = 0.95
# Seconds until a change counts as one that makes the tests hang.
DEADLINE = 420
# Go over all methods: only those named are asked.
SHARED = ("test_contract.py", "test_told.py")


@dataclass(frozen=True)
class Change:
    """One change of a module of stepdistill: kind is what a reader would call the mistake."""

    file: str
    kind: str
    old: str
    new: str
    tests: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.file}: {self.old} -> {self.new}"

    @property
    def path(self) -> Path:
        return ROOT / "stepdistill" / self.file

    @property
    def module(self) -> str:
        return "stepdistill." + self.file.removesuffix(".py").replace("/", ".")

    def source(self) -> str:
        """The module's text with the change made."""
        text = self.path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} has {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)


def listed() -> list[Change]:
    import yaml

    found = []
    for path in sorted(HERE.glob("*.yaml")):
        for file, entry in yaml.safe_load(path.read_text()).items():
            ties = tuple(entry["tests"]), tuple(entry["names"])
            found += [Change(file, *change, *ties) for change in entry["changes"]]
    return found


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds one module, with another text than its file has."""

    def __init__(self, change: Change):
        super().__init__(change.module, str(change.path))
        self.code = compile(change.source(), str(change.path), "exec")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return self.code


class Watch:
    """Leaves out what is of other methods, and notes the first test that fails."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.failed, self.count = names, "", 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def asked(item: Any) -> bool:
            named = getattr(item, "callspec", None) and item.callspec.params.get("name")
            return item.path.name not in SHARED or not named or named in self.names

        items[:] = [item for item in items if asked(item)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.count += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid


def run_tests(change: Change, mutated: bool, answer: Path) -> None:
    """In a child: runs the tests, writes what came of it, and never returns."""
    import pytest

    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    if mutated:
        sys.meta_path.insert(0, Mutated(change))
    watch = Watch(change.names)
    paths = [str(ROOT / "tests" / test) for test in change.tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--timeout=120"]
    code = pytest.main([*options, "-m", "not slow and not gpu", f"--rootdir={ROOT}", *paths], plugins=[watch])
    answer.write_text(json.dumps({"code": int(code), "by": watch.failed, "count": watch.count}))
    os._exit(0)


def warm() -> None:
    """What every test needs and no change touches."""
    import diffusers  # noqa: F401
    import numpy  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.split(".")[0] == "stepdistill"]


def judged(answer: Path, late: bool) -> tuple[str, str]:
    """("caught" | "survived" | "broken", by which test)."""
    if late:
        return "caught", "the deadline"
    said = (
        json.loads(answer.read_text())
        if answer.exists() and answer.stat().st_size
        else {"code": -1, "by": ""}
    )
    if said["code"] == 1 and said["by"]:
        return "caught", said["by"].removeprefix("tests/")
    # Where no test ran, nothing was tried.
    return (
        ("survived", "")
        if said["code"] == 0 and said["count"]
        else ("broken", f"pytest ended with {said['code']}")
    )


def work(tasks: list[tuple[Change, bool]], jobs: int, done: Any) -> None:
    """Runs tasks in children, at most `jobs` at a time, and calls done(change, mutated, answer, by, seconds)."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    running: dict[int, tuple[Change, bool, Path, float]] = {}
    waiting = list(reversed(tasks))
    while waiting or running:
        while waiting and len(running) < jobs:
            change, mutated = waiting.pop()
            answer = folder / str(len(waiting))
            if (child := os.fork()) == 0:
                try:
                    run_tests(change, mutated, answer)
                finally:
                    os._exit(1)
            running[child] = change, mutated, answer, time.monotonic()
        time.sleep(0.1)
        for child, (change, mutated, answer, began) in list(running.items()):
            late = time.monotonic() - began > DEADLINE
            if late:
                os.killpg(child, signal.SIGKILL)
            if os.waitpid(child, 0 if late else os.WNOHANG)[0]:
                del running[child]
                done(change, mutated, *judged(answer, late), round(time.monotonic() - began, 1))


def write(results: dict[str, dict[str, Any]], changes: list[Change]) -> float:
    """Keeps the results of what is listed, and gives the share that was caught."""
    kept = [results[change.key] for change in changes if change.key in results]
    answers = [each["answer"] for each in kept]
    summary = {answer: answers.count(answer) for answer in sorted(set(answers))}
    head = json.dumps({"listed": len(changes)} | summary)
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in kept)
    partial = RESULT.with_suffix(".part")
    partial.write_text(f'{{"summary": {head}, "changes": [\n{lines}\n]}}\n')
    partial.replace(RESULT)
    return answers.count("caught") / max(1, len(changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="changes tried at a time")
    parser.add_argument("--only", default="", help="files whose name holds this")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    changes = listed()
    marks = {change.file: hashlib.sha256(change.path.read_bytes()).hexdigest()[:12] for change in changes}
    results = {}
    if RESULT.exists():
        results = {each["change"]: each for each in json.loads(RESULT.read_text())["changes"]}
    open_ = [
        change
        for change in changes
        if given.only in change.file
        and not (
            (old := results.get(change.key)) and old["answer"] == "caught" and old["of"] == marks[change.file]
        )
    ]
    warm()
    failing: set[str] = set()

    def tried(change: Change, mutated: bool, answer: str, by: str, seconds: float) -> None:
        if not mutated:
            if answer != "survived":
                failing.add(change.file)
                print(f"{change.file}: its tests fail as it is ({by}); nothing is told by them", flush=True)
            return
        results[change.key] = {
            "change": change.key, "kind": change.kind, "of": marks[change.file], "answer": answer, "by": by,
            "seconds": seconds,
        }  # fmt: skip
        write(results, changes)
        if answer != "caught":
            print(f"{answer}: {change.key} {by}", flush=True)

    # As it is, each module passes its tests.
    work([(change, False) for change in {c.file: c for c in open_}.values()], given.jobs, tried)
    work([(change, True) for change in open_ if change.file not in failing], given.jobs, tried)
    share = write(results, changes)
    print(f"{share:.1%} of {len(changes)} changes are caught; see {RESULT}")
    sys.exit(share < LEAST)


if __name__ == "__main__":
    main()
