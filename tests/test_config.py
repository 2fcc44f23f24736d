"""From YAML to typed dataclasses: coercion by annotation, overrides, and errors that name the field."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from stepdistill.config import apply_overrides, build, coerce, dump
from stepdistill.errors import UserError
from stepdistill.methods import METHODS
from stepdistill.registry import Table, resolve
from stepdistill.yaml_files import read_yaml


@dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclass(frozen=True)
class Outer:
    count: int
    rate: float = 1.0
    flag: bool = False
    name: str = "x"
    path: Path | None = None
    steps: tuple[int, ...] = (1,)
    pair: tuple[float, float] = (0.0, 1.0)
    words: list[str] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    mode: Literal["no", "bf16"] = "no"
    size: int | str = 1
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must be 0 or more, got {self.count}.")


pytestmark = pytest.mark.usefixtures("own_code")


def from_yaml(text: str) -> Outer:
    return build(Outer, yaml.safe_load(text), "outer")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        # PyYAML reads this as text.
        ("rate: 1e-5", "rate", 1e-5),
        ("rate: 3", "rate", 3.0),
        ("count: 1e3", "count", 1000),
        ("count: 2.0", "count", 2),
        ('flag: "true"', "flag", True),
        ("flag: False", "flag", False),
        # PyYAML reads this as False.
        ("mode: no", "mode", "no"),
        ("path: a/b", "path", Path("a/b")),
        ("path: null", "path", None),
        ("steps: [1, 2, 4]", "steps", (1, 2, 4)),
        ("steps: 4", "steps", (4,)),
        ("steps: 1,2,4", "steps", (1, 2, 4)),
        ("pair: [1e-1, 2]", "pair", (0.1, 2.0)),
        ("words: [a, b]", "words", ["a", "b"]),
        ("table: {a: 1e-1}", "table", {"a": 0.1}),
        ("size: big", "size", "big"),
        ("size: 3", "size", 3),
        ("inner: {width: 8}", "inner", Inner(8)),
    ],
)
def test_values_follow_the_annotation(line: str, name: str, value: Any) -> None:
    found = getattr(from_yaml(line if line.startswith("count") else f"count: 1\n{line}"), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rate: abc", "outer.rate: expected a number, got 'abc'."),
        ("rate: .nan", "outer.rate: expected a number, got nan."),
        ("rate: true", "outer.rate: expected a number, got True."),
        ("count: 2.7", "outer.count: expected a whole number, got 2.7."),
        ("count: true", "outer.count: expected a whole number, got True."),
        ("count: .inf", "outer.count: expected a whole number, got inf."),
        ("count:", "outer.count: expected a whole number, got nothing."),
        ("flag: 1", "outer.flag: expected true or false, got 1."),
        ("flag: maybe", "outer.flag: expected true or false, got 'maybe'."),
        (
            "name: no",
            "expected text, got False; YAML reads a bare no/off/false as a boolean, so put it in quotes.",
        ),
        ("name: 12", "outer.name: expected text, got 12; put it in quotes to keep it as text."),
        ("mode: fp16", "outer.mode: expected one of no, bf16; got 'fp16'. Did you mean 'bf16'?"),
        ("steps: [1, a]", "outer.steps[1]: expected a whole number, got 'a'."),
        ("pair: [1]", "outer.pair: expected a list of 2 values, got [1]."),
        ("table: {a: b}", "outer.table.a: expected a number, got 'b'."),
        ("table: 3", "outer.table: expected a section"),
        ("inner: {widht: 8}", "unknown key outer.inner.widht; did you mean outer.inner.width?"),
        ("count: -1", "outer.count must be 0 or more, got -1."),
        ("zzz: 1", "unknown key outer.zzz; known are count, rate,"),
        ("rate: 1", "outer.count is missing; give it a whole number."),
    ],
)
def test_errors_name_the_field_and_the_value(line: str, message: str) -> None:
    text = line if line.startswith("count") or line == "rate: 1" else f"count: 1\n{line}"
    with pytest.raises(UserError) as error:
        from_yaml(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unions_prefer_the_exact_type() -> None:
    assert coerce([1], str | list[int], "x") == [1]
    assert coerce("7", int | str, "x") == "7"
    with pytest.raises(UserError, match="x: expected a whole number or text, got True"):
        coerce(True, int | str, "x")


def test_overrides() -> None:
    base = {"a": {"b": 1}, "stages": [{"method": {"name": "x"}}, {}], "empty": None}
    new = apply_overrides(
        base, ["a.b=1e-6", "a.c=k=v", "stages.1.method.name=y", "empty.x=[1, 2]", "new.one=true"]
    )
    assert new["a"] == {"b": "1e-6", "c": "k=v"}
    assert new["stages"] == [{"method": {"name": "x"}}, {"method": {"name": "y"}}]
    assert new["empty"] == {"x": [1, 2]} and new["new"] == {"one": True}
    assert base == {"a": {"b": 1}, "stages": [{"method": {"name": "x"}}, {}], "empty": None}
    for override, message in [
        ("a.b", "'a.b' is not an override; write section.key=value"),
        (".b=1", "is not an override"),
        ("a.b.c=1", "a.b.c: a.b is 1, which has no keys"),
        ("stages.2.x=1", "stages has 2 entries, numbered from 0"),
        ("a.b=[", "a.b: cannot read '['"),
    ]:
        with pytest.raises(UserError) as error:
            apply_overrides(base, [override])
        assert message in str(error.value)


def test_read_yaml_errors(tmp_path: Path) -> None:
    def message(text: bytes) -> str:
        (tmp_path / "r.yaml").write_bytes(text)
        with pytest.raises(UserError) as error:
            read_yaml(tmp_path / "r.yaml")
        return str(error.value)

    assert "r.yaml, line 2: not valid YAML" in message(b"a: 1\nb: c: d\n")
    assert "line 3: not valid YAML: the key 'lr' appears twice" in message(b"optim:\n  lr: 1\n  lr: 2\n")
    assert "expected sections" in message(b"- 1\n")
    assert "expected sections" in message(b"")
    assert "not UTF-8" in message(b"a: \xff\n")
    with pytest.raises(UserError, match=r"there is no file .*rr\.yaml\. Did you mean 'r\.yaml'\?"):
        read_yaml(tmp_path / "rr.yaml")
    with pytest.raises(UserError, match="is a directory"):
        read_yaml(tmp_path)


def test_dump_reads_back() -> None:
    config = Outer(
        3, 1e-5, True, "1e-5", Path("a b"), (1, 2), (0.5, 1e-8), ["no", "010"], {"x": 1e20}, "no", "12"
    )
    assert build(Outer, yaml.safe_load(dump(config)), "outer") == config


def test_resolve() -> None:
    table = Table(
        "builtins:object", {"config": "stepdistill.yaml_files:_Loader", "gone": "stepdistill.no_such:X"}
    )
    assert resolve("config", table, "thing").__name__ == "_Loader"
    assert resolve(f"{__name__}:Inner", table, "thing").__name__ == "Inner"
    for name, message in [
        ("confg", "unknown thing 'confg'. Did you mean 'config'? Known are config, gone;"),
        ("gone", "there is no module 'stepdistill.no_such'"),
        (f"{__name__}:Nothing", "has no class 'Nothing'"),
        ("yaml:safe_load", "has no class 'safe_load'"),
        ("a.b.C", "unknown thing 'a.b.C'"),
    ]:
        with pytest.raises(UserError) as error:
            resolve(name, table, "thing")
        assert message in str(error.value)


def test_a_broken_import_inside_a_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve("needs_more:X", METHODS, "method")
