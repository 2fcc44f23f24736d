"""A recipe made to last as long as a budget says: all stages in proportion, and with them what it counts in iterations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

# What recipes count in iterations, beside run.steps.
COUNTED = ("warmup", "warmup_steps", "double_every", "interval")


def stages_of(mapping: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The sections of each stage, as they are written."""
    return mapping.get("stages") or [mapping]


def lengths(mapping: Mapping[str, Any]) -> list[int]:
    """Iterations of each stage."""
    return [stage["run"]["steps"] for stage in stages_of(mapping)]


def parts_of(mapping: Mapping[str, Any]) -> int:
    """How often the recipe is run: once for each part of the data, where it is of one."""
    return int((mapping["data"].get("partition") or "1/1").split("/")[1])


def served(mapping: Mapping[str, Any]) -> list[int]:
    """The numbers of sampling steps that the finished student is made for."""
    last = {**(mapping.get("student") or {}), **(stages_of(mapping)[-1].get("student") or {})}
    return list(last.get("steps", [1]))


def budgeted(seconds: float, fixed: float, each: Sequence[float], counts: Sequence[int]) -> list[int]:
    """Iterations of each stage, in the proportions of `counts`, that take `seconds` together with what is `fixed`.

    each: seconds of an iteration of each stage. A stage has one iteration at least.
    """
    factor = max(0.0, seconds - fixed) / sum(cost * count for cost, count in zip(each, counts, strict=True))
    return [max(1, round(factor * count)) for count in counts]


def resized(mapping: Mapping[str, Any], iterations: Sequence[int]) -> dict[str, Any]:
    """The recipe with so many iterations in each stage."""
    before = lengths(mapping)
    result = _stretched(mapping, sum(iterations) / sum(before))
    if stages := mapping.get("stages"):
        each = zip(stages, iterations, before, strict=True)
        result["stages"] = [_stretched(stage, new / old) for stage, new, old in each]
    for stage, count in zip(stages_of(result), iterations, strict=True):
        stage["run"]["steps"] = count
    return result


def _stretched(node: Any, factor: float) -> Any:
    """A copy, in which settings of the names in COUNTED are `factor` times as many; what is 0 stays off."""
    if isinstance(node, Mapping):
        return {
            key: max(1, round(value * factor)) if key in COUNTED and value else _stretched(value, factor)
            for key, value in node.items()
        }
    return [_stretched(each, factor) for each in node] if isinstance(node, list) else copy.copy(node)
