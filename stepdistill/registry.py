"""Names to classes, imported on demand: a table of strings costs nothing until one of its entries is used.

A file that names a class "module:Class" names code to run, and most files come from somebody else. Registered
names are therefore all that is resolved, until the person says otherwise on a command line (`--allow-code`);
what was downloaded is never asked (`registered_only`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from stepdistill.errors import UserError, nearest

_allowed: ContextVar[bool] = ContextVar("classes outside the tables may be imported", default=False)


class Table(dict[str, str]):
    """The registered names of one kind of class and where each lies, "package.module:Class".

    base: where the class lies that all of them derive from. What derives from something else is never made.
    """

    def __init__(self, base: str, classes: Mapping[str, str]) -> None:
        super().__init__(classes)
        self.base = base


@contextlib.contextmanager
def allowing_code(allowed: bool = True) -> Iterator[None]:
    """Within the block a name may be "module:Class", one's own. Only a command line's `--allow-code` opens it."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def add_allow_code(parser: argparse._ActionsContainer) -> None:
    """Give a command the option that `allowing_code` is told."""
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="import and run the classes of your own that are named as my_module:MyClass",
    )


def resolve(name: Any, table: Table, what: str, *, where: str = "", registered_only: bool = False) -> type:
    """The class called `name` in `table`, or, where `allowing_code`, the one it names as "module:Class".

    Args:
        what: the noun for messages: "method", "family", ...
        where: the field `name` was read from, such as "method.eye".
        registered_only: refuse "module:Class" even where code is allowed, as for whatever was downloaded.

    Raises:
        UserError: the name is unknown, would import what was not allowed, points at a module or class that does
            not exist, or at a class of another kind. Nothing is imported before it is allowed.
    """
    where = where or what
    own = isinstance(name, str) and name not in table and _is_target(name)
    if not own and not (isinstance(name, str) and name in table):
        raise UserError(
            f"unknown {what} {name!r}.{nearest(name, table)} Known are {', '.join(sorted(table))};"
            " your own is written my_package.my_file:MyClass, and allowed with --allow-code."
        )
    target = name if own else table[name]
    module_name, _, class_name = target.partition(":")
    if own and (registered_only or not _allowed.get()):
        way_out = (
            "known are" if registered_only else "allow it with --allow-code if you trust it, or choose one of"
        )
        raise UserError(
            f"{where} {name!r} would import the module {module_name} and run its class {class_name};"
            f" {way_out} {', '.join(sorted(table))}."
        )
    found, base = _import(target, where, name), _import(table.base, where, name)
    if base not in found.__mro__:
        raise UserError(
            f"{where} {name!r}: {class_name} is no {what}; derive it from {table.base.replace(':', '.')}."
        )
    return found


def made(found: type, arguments: Mapping[str, Any], name: str, where: str = "method") -> Any:
    """`found(**arguments)`, of what `resolve` found by `name`. Raises UserError naming `where`.arguments that do not fit."""
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{where}.arguments do not fit {name}: {error}.") from None
    return found(**arguments)


def _is_target(name: str) -> bool:
    module_name, _, class_name = name.partition(":")
    return class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))


def _import(target: str, where: str, name: str) -> type:
    module_name, _, class_name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        # Only the module asked for is the person's mistake; a missing import inside it keeps its traceback.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise UserError(f"{where} {name!r}: there is no module {error.name!r} to import.") from None
    if not isinstance(found, type):
        raise UserError(f"{where} {name!r}: the module {module_name} has no class {class_name!r}.")
    return found
