"""Which models there are: the ids that a request may name, each with its directory and what is known of it.

Only what the command line named is in it; no id of a client ever becomes a path. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.request import Limits
from stepdistill import assets

TEACHER = "teacher"
STUDENT = "student"


@dataclass
class Entry:
    """A model by its id.

    Attributes:
        state: "idle" (not loaded), "loading", "ready" or "failed"; `problem` says why it failed.
        limits, about: known once it was loaded, and kept when another takes its place.
    """

    id: str
    path: Path
    title: str
    state: str = "idle"
    problem: str | None = None
    limits: Limits | None = None
    about: dict[str, Any] = field(default_factory=dict)


def catalog(students: Iterable[str | Path | None], teacher: str | Path | bool | None) -> dict[str, Entry]:
    """The entries by id: the first student is "student", further ones are called as their directories are.

    students: directories, None for the embedded one. teacher: a directory, None for the embedded one, False
        for none.
    """
    entries: dict[str, Entry] = {}
    for directory in students:
        path = Path(assets.path(STUDENT) if directory is None else directory)
        name = STUDENT if not entries else _free(_plain(path), entries)
        entries[name] = Entry(name, path, _title(path))
    if teacher is not False:
        path = Path(assets.path(TEACHER) if teacher in (None, True) else teacher)
        entries[TEACHER] = Entry(TEACHER, path, _title(path))
    return entries


def _title(path: Path) -> str:
    """The name in the model's card, or that of its directory."""
    try:
        name = json.loads((path / "stepdistill.json").read_text()).get("name")
    except (OSError, ValueError, AttributeError, RecursionError):
        name = None
    return name if isinstance(name, str) and name else path.name


def _plain(path: Path) -> str:
    """A directory's name, or its parent's where it says nothing, in letters that a URL takes."""
    name = path.parent.name if path.name == STUDENT and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"


def _free(name: str, taken: Iterable[str]) -> str:
    known, at, free = {*taken, TEACHER, STUDENT}, 1, name
    while free in known:
        at += 1
        free = f"{name}-{at}"
    return free
