"""Whether the recipe of a run that goes on is still its own: what may change on the way, and what may not.

What a checkpoint's content depends on may not: the teacher, the method, the student and the kind of optimiser. All else may,
from the next step on, and is said by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError

# Of dotted names in a recipe; `stages.0.` stands before those of a stage.
_FIXED = re.compile(r"(stages\.\d+\.)?(family|method|student|optim\.([^.]+\.)?optimizer)(\.|$)")
_STAGE = re.compile(r"stages\.(\d+)\.")


Change = tuple[str, Any, Any]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Change], list[Change]]:
    """(what may not change, what may) of all that differs between two written recipes: (dotted name, before, now)."""
    before, now = _leaves(old), _leaves(new)
    first, second = len(old.get("stages") or []), len(new.get("stages") or [])
    fixed, free = [], []
    for name in [*before, *(name for name in now if name not in before)]:
        a, b = before.get(name), now.get(name)
        stage = _STAGE.match(name)
        if a == b or (stage and int(stage[1]) >= min(first, second)):
            continue
        if _FIXED.match(name):
            fixed.append((name, a, b))
        else:
            free.append((name, a, b))
    # Stages may be added at the end, and none may go.
    fixed += [(f"stages.{i}", "a stage", None) for i in range(second, first)]
    free += [(f"stages.{i}", None, "a stage") for i in range(first, second)]
    return fixed, free


def refuse(path: Path, fixed: list[Change]) -> None:
    """UserError with every name where there are any."""
    if not fixed:
        return
    named = "; ".join(
        f"{name}={shown(before)}, and this recipe has {shown(now)}" for name, before, now in fixed
    )
    raise UserError(
        f"{path} holds a run with {named}; this may not change within a run: set it back, choose another directory with"
        " run.out=..., or start over with --fresh."
    )


def said(free: list[Change]) -> str:
    """A sentence that names every change, "" without one."""
    named = "; ".join(f"{name} was {shown(before)} and is {shown(now)}" for name, before, now in free)
    return f"the recipe has changed, which holds from here on: {named}." if named else ""


def shown(value: Any) -> str:
    """A value of a recipe, in a sentence."""
    return "nothing" if value is None else str(value)


def _leaves(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every value by its dotted name; the recipe's stages by their numbers."""
    stages = {str(i): stage for i, stage in enumerate(recipe.get("stages") or [])}
    return _named({**recipe, "stages": stages})


def _named(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _named(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
