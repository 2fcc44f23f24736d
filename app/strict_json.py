"""JSON of strangers: what Python's parser takes beyond the standard, and what no program can use, is refused."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(raw: bytes, max_depth: int) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        ValueError: what is wrong, as the end of a sentence: not JSON, no object, NaN or infinity, more than
            `max_depth` levels, or half a surrogate pair, which is no character and could not be written.
    """
    try:
        read = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(read, dict):
        raise ValueError("it is not a JSON object")
    level: list[Any] = [read]
    for _ in range(max_depth + 1):
        for value in level:
            if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
                raise ValueError("it holds half a character (a lone surrogate)")
            if isinstance(value, float) and math.isinf(value):
                raise ValueError("it holds a number that is too large")
        inner = [value for value in level if isinstance(value, list)]
        inner += [[*value.keys(), *value.values()] for value in level if isinstance(value, dict)]
        level = [value for values in inner for value in values]
        if not level:
            return read
    raise ValueError(f"it is nested deeper than {max_depth} levels")


def _refuse_constant(name: str) -> float:
    raise ValueError(name)
