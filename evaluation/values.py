"""A measured number and how it is read, so that tables, plots and best checkpoints need no lists of their own."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Better = Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Value:
    """One number a metric gives.

    name: "kid:scenes-v1/subsets" is the value `subsets` of the metric `kid` on features of `scenes-v1`; a metric
    declares it as "kid/subsets". se: its standard error, NaN where there are too few samples, None where none is
    known. better: which way is better; "none" for what only explains another number. main: shown first, plotted.
    protocol: what its samples are of, with their number, where that is not the protocol of the numbers beside it.
    compares: with the teacher's, so it is there only where that is measured as well.
    """

    name: str
    value: float = math.nan
    se: float | None = None
    better: Better = "none"
    main: bool = False
    protocol: str = ""
    compares: bool = False


def measured(
    declared: Iterable[Value], numbers: Mapping[str, float | tuple[float, float]], source: str = ""
) -> list[Value]:
    """The declared values with their numbers, in the order of `numbers`: a number, or one and its standard error.

    source: name of the extractor or model they were measured with; it becomes part of their names.
    """
    known = {value.name: value for value in declared}
    values = []
    for name, number in numbers.items():
        value, error = number if isinstance(number, tuple) else (number, None)
        kind, slash, part = name.partition("/")
        full = f"{kind}:{source}{slash}{part}" if source else name
        values.append(replace(known[name], name=full, value=value, se=error))
    return values


def flat(values: Iterable[Value]) -> dict[str, float]:
    """Numbers by name, a standard error behind its value as "<name>/se": how result files hold them."""
    by_name: dict[str, float] = {}
    for value in values:
        by_name[value.name] = value.value
        if value.se is not None:
            by_name[f"{value.name}/se"] = value.se
    return by_name


def declared_name(name: str) -> str:
    """ "kid/subsets" of "kid:scenes-v1/subsets"."""
    return re.sub(r":[^/]*", "", name, count=1)


def readings(results: Mapping[str, Any]) -> dict[str, Value]:
    """How every number of a results file is read, in the order measured, without standard errors. What only some rows
    have stands behind what comes before it there.

    Files of earlier versions don't say it; there, a value that is declared by a metric of METRICS is read as that
    metric says, and any other one only explains.
    """
    said = results.get("values") or {}
    names: list[str] = []
    for row in results["rows"]:
        at = 0
        for name in row["metrics"]:
            if name not in names:
                names.insert(at, name)
            at = names.index(name) + 1
    read = {}
    for name in names:
        if name in said:
            one = said[name]
            read[name] = Value(name, better=one["better"], main=one["main"], protocol=one.get("protocol", ""))
        elif not name.endswith("/se"):
            read[name] = _declared().get(declared_name(name), Value(name))
    return read


def written(values: Sequence[Value]) -> dict[str, dict[str, Any]]:
    """What `readings` reads from a results file."""
    return {
        value.name: {"better": value.better, "main": value.main}
        | ({"protocol": value.protocol} if value.protocol else {})
        for value in values
    }


@functools.cache
def _declared() -> dict[str, Value]:
    from evaluation.metrics import METRICS
    from stepdistill.registry import resolve

    return {value.name: value for name in METRICS for value in resolve(name, METRICS, "metric").values}
