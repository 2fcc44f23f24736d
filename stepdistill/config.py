"""From YAML to typed dataclasses: one loader for every configuration of the project.

PyYAML follows YAML 1.1, which reads `1e-5` as a string, `no` as False and `010` as 8. Values are therefore
coerced by the annotation of the field they are meant for; what cannot be meant is refused with one sentence.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from stepdistill.errors import UserError, nearest
from stepdistill.yaml_files import parse_yaml

T = TypeVar("T")
_SEQUENCES = {list: list, tuple: tuple, Sequence: tuple}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_YAML_BOOLEANS = {False: ("no", "off", "false"), True: ("yes", "on", "true")}


class UnknownKey(UserError):
    """A key no field answers to. `section` and `key` let the caller suggest a field of another section."""

    def __init__(self, section: str, key: str, known: Iterable[str]) -> None:
        self.section, self.key = section, key
        prefix, known = f"{section}." if section else "", list(known)
        close = closest(key, known)
        hint = f"did you mean {prefix}{close}?" if close else f"known are {', '.join(known) or 'none'}."
        super().__init__(f"unknown key {prefix}{key}; {hint}")


def build(cls: type[T], mapping: Mapping[str, Any] | None, where: str) -> T:
    """An instance of the dataclass `cls` from a mapping; `where` is its dotted name in messages.

    A `cls` checks ranges in its `__post_init__` by raising ValueError("lr must be above 0, got -1."); if
    the message begins with a field's name, it is completed to "optim.lr must be ...".

    Raises:
        UserError: an unknown key, a wrong type, a missing required field, or what `cls` itself refuses.
    """
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected a section of `key: value` lines, got {mapping!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            raise UnknownKey(where, str(key), fields)
    hints, values = get_type_hints(cls), {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = coerce(mapping[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name} is missing; give it {_expected(hints[name])}.")
    try:
        return cls(**values)
    except ValueError as error:
        # What a Config refuses in its __post_init__.
        names_field = str(error).split(" ", 1)[0].partition("[")[0] in fields
        raise UserError(f"{where}{'.' if names_field else ': '}{error}") from None


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotation `kind` wants it; UserError naming `where` when it cannot be meant."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (Union, types.UnionType):
        return _union(value, args, where)
    if origin is Literal:
        return _literal(value, args, where)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)
    if (origin or kind) in _SEQUENCES:
        return _sequence(value, kind, _SEQUENCES[origin or kind], args, where)
    if (origin or kind) in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(where, kind, value)
        return {key: coerce(item, args[1] if args else Any, f"{where}.{key}") for key, item in value.items()}
    if kind in _EXPECTED:
        return _scalar(value, kind, where)
    raise TypeError(f"{where}: a field annotated {kind} cannot be read from YAML")


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind in (str, Path):
        if isinstance(value, (str, Path)):
            return kind(value)
        if isinstance(value, bool):
            why = f"YAML reads a bare {'/'.join(_YAML_BOOLEANS[value])} as a boolean, so put it in quotes"
        elif value is None or isinstance(value, (Mapping, list)):
            raise _wrong(where, kind, value)
        else:
            why = "put it in quotes to keep it as text"
        raise UserError(f"{where}: expected {_EXPECTED[kind]}, got {value}; {why}.")
    if kind is bool:
        word = value.strip().lower() if isinstance(value, str) else value
        if isinstance(word, bool) or word in ("true", "false"):
            return word in (True, "true")
        raise _wrong(where, kind, value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wrong(where, kind, value)
    try:
        number = value if isinstance(value, int) else float(value)
        # What is larger overflows in the libraries, each in its own words.
        if kind is int and not abs(number) < 2**63:
            raise _wrong(where, kind, value)
        number = number if kind is int else float(number)
    except (ValueError, OverflowError):
        raise _wrong(where, kind, value) from None
    if math.isnan(number) or (kind is int and number != int(number)):
        raise _wrong(where, kind, value)
    return kind(number)


def _literal(value: Any, choices: tuple, where: str) -> Any:
    for choice in choices:
        same = type(value) is type(choice) and value == choice
        if same or (isinstance(value, str) and value == str(choice)):
            return choice
    # `precision: no` can only mean the word when the word is a choice.
    if isinstance(value, bool):
        meant = [word for word in _YAML_BOOLEANS[value] if word in choices]
        if len(meant) == 1:
            return meant[0]
    hint = nearest(str(value), map(str, choices))
    raise UserError(f"{where}: expected one of {', '.join(map(str, choices))}; got {_shown(value)}.{hint}")


def _union(value: Any, kinds: tuple, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return coerce(value, kinds[0], where)
    # The exact type goes first: a list is not to become text where both are welcome.
    for kind in sorted(kinds, key=lambda kind: type(value) is not (get_origin(kind) or kind)):
        try:
            return coerce(value, kind, where)
        except UserError:
            continue
    raise _wrong(where, Union[kinds], value)  # noqa: UP007


def _sequence(value: Any, kind: Any, make: type, args: tuple, where: str) -> Any:
    item = args[0] if args else Any
    fixed = make is tuple and args and args[-1] is not Ellipsis
    if item in (int, float):
        # `student.steps=1,2,4` on a command line.
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
        raise _wrong(where, kind, value)
    kinds = args if fixed else [item] * len(value)
    pairs = enumerate(zip(value, kinds, strict=True))
    return make(coerce(part, kind, f"{where}[{i}]") for i, (part, kind) in pairs)


def _wrong(where: str, kind: Any, value: Any) -> UserError:
    return UserError(f"{where}: expected {_expected(kind)}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """A value in a message, of which the beginning will do."""
    if value is None:
        return "nothing"
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _expected(kind: Any) -> str:
    """An annotation in words, for messages."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _expected(part) for part in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values"
    if (origin or kind) in _SEQUENCES:
        return f"a list (each {_expected(args[0])})" if args else "a list"
    if (origin or kind) in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "a section of `key: value` lines"
    return _EXPECTED.get(kind, "a value")


def closest(name: str, choices: Iterable[str]) -> str:
    """The one of `choices` `name` likely means, or "": by spelling, initials (learning_rate, lr) or part."""
    choices = list(choices)
    if len(name) > 200:
        return ""
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    found += [choice for choice in choices if _initials(name) == choice or name == _initials(choice)]
    if not found and len(name) >= 3:
        found = [choice for choice in choices if len(choice) >= 3 and (name in choice or choice in name)]
    return found[0] if found else ""


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with each "a.b=value" set. Values are YAML; a number in the path indexes a list.

    Raises:
        UserError: an override without "=", a value that is not YAML, or a path through what has no keys.
    """
    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(
                f"{override!r} is not an override; write section.key=value, such as optim.lr=1e-5."
            )
        try:
            value = parse_yaml(text)
        except ValueError:
            raise UserError(f"{dotted}: cannot read {text[:100]!r} as a value; put text in quotes.") from None
        _set(result, keys, value, dotted)
    return result


def _set(node: Any, keys: list[str], value: Any, dotted: str) -> None:
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise UserError(f"{dotted}: {here} has {len(node)} entries, numbered from 0.")
            key = int(key)
        elif not isinstance(node, dict):
            raise UserError(f"{dotted}: {here} is {_shown(node)}, which has no keys of its own.")
        if depth == len(keys) - 1:
            node[key] = value
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]


def plain(obj: Any) -> Any:
    """Dataclasses, tuples and paths as dicts, lists and strings. An object's own `mapping()` goes first."""
    if hasattr(obj, "mapping") and not isinstance(obj, type):
        return plain(obj.mapping())
    if dataclasses.is_dataclass(obj):
        return {field.name: plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj


def dump(obj: Any) -> str:
    """YAML that reads back to the same configuration."""
    return yaml.safe_dump(plain(obj), sort_keys=False, allow_unicode=True, width=110)
