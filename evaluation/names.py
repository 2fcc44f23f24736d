"""Names of files: their natural order, whether they tell an order at all, and which are images."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from evaluation.decoding import suffixes


def left_out(name: str) -> str:
    """Why a member of an archive is no image by its name; "" where it is one."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or "__MACOSX" in path.parts:
        return "hidden"
    return "" if path.suffix.lower() in suffixes() else path.suffix.lower() or "without a suffix"


def natural(name: str) -> tuple[object, ...]:
    """A key that sorts names part by part and numbers by their value; equal numbers by how they are written."""
    parts = re.split(r"[/\\]", name)
    return (
        *([(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", part)] for part in parts),
        [(-1, name)],
    )


def in_known_order(names: list[str]) -> bool:
    """Whether names say which image is which: they differ in numbers alone, or in the first number each has."""
    bare = [re.sub(r"\.\w+$", "", name) for name in names]
    first = [re.split(r"(\d+)", PurePosixPath(name).name, maxsplit=1) for name in bare]
    if len({re.sub(r"\d+", "#", name) for name in bare}) == 1:
        return len(set(bare)) == len(bare)
    keys = {(parts[0], int(parts[1])) for parts in first if len(parts) > 1}
    return len(keys) == len(names) and len({prefix for prefix, _ in keys}) == 1
