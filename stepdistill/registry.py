"""Names to classes, imported on demand: a table of strings costs nothing until one of its entries is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from stepdistill.errors import UserError, nearest


def resolve(name: str, table: Mapping[str, str], what: str) -> type:
    """The class called `name` in `table`, whose values read "package.module:Class".

    A `name` that is itself of that form is imported as given, so one's own class needs no entry. `what` is
    the noun for messages: "method", "family", ...

    Raises:
        UserError: the name is in no table, or the module or class it points at does not exist.
    """
    target = table.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon or not module_name or not class_name:
        raise UserError(
            f"unknown {what} {name!r}.{nearest(name, table)} Known are {', '.join(sorted(table))};"
            " your own is written my_package.my_file:MyClass."
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        # Only the module asked for is the person's mistake; a missing import inside it keeps its traceback.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise UserError(f"{what} {name!r}: there is no module {error.name!r} to import.") from None
    if not isinstance(found, type):
        raise UserError(f"{what} {name!r}: the module {module_name} has no class {class_name!r}.")
    return found
