"""YAML that may come from anybody: plain values, and no more of them than a person would write.

A few lines of aliases stand for more values than any memory holds, and brackets within brackets end in the interpreter
and not in a sentence. So what was read is counted, with every alias as often as it is used, before anything walks it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from stepdistill.errors import UserError, nearest
from stepdistill.untrusted import read_regular

# Of a recipe or protocol: the largest shipped has 3 kB, 80 values and 5 levels.
FILE_BYTES = 1 << 20
VALUES = 100_000
LEVELS = 40


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where PyYAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    problem = f"the key {key.value!r} appears twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: it is none, or has more than `VALUES` values or `LEVELS` levels; the message says which, and of the
            first also where.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{line}not valid YAML: {problem}") from None
    except RecursionError:
        raise ValueError(f"nested over more than {LEVELS} levels") from None
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError) as error:
        # A number of thousands of digits, the thirtieth of February, a list as a key.
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:200]}") from None
    _bounded(value)
    return value


def _bounded(value: Any) -> None:
    """ValueError for what is larger than it looks, or holds itself."""
    pending, count = [(value, 0)], 0
    while pending:
        part, level = pending.pop()
        count += 1
        if level > LEVELS:
            raise ValueError(f"nested over more than {LEVELS} levels")
        if count + len(pending) > VALUES:
            raise ValueError(f"of more than {VALUES:,} values, each alias counted as often as it is used")
        inner = (
            part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple, set)) else ()
        )
        pending += ((each, level + 1) for each in inner)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not UTF-8, larger than a person writes, not YAML (with the line), a key written twice, or
            not a mapping.
    """
    path = Path(path)
    try:
        text = read_regular(path, FILE_BYTES).decode("utf-8")
    except FileNotFoundError:
        beside = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"there is no file {path}.{nearest(path.name, beside)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except (OSError, ValueError) as error:
        if path.is_dir():
            raise UserError(f"{path} is a directory; give a YAML file.") from None
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)!r} cannot be read ({why}); give a YAML file.") from None
    try:
        mapping = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}, {error}.".replace(", not valid", ": not valid")) from None
    if not isinstance(mapping, dict):
        got = "nothing" if mapping is None else repr(mapping)[:60]
        raise UserError(f"{path}: expected sections of `key: value` lines, got {got}.")
    return mapping
