"""What a student directory knows of itself: `stepdistill.json` beside the stock diffusers files.

One reader and one writer. Format 2 holds the `Sampling` as it is; format 1, which earlier versions wrote, had its
fields loose among the others, and is still read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stepdistill.config import build
from stepdistill.errors import UserError, atomic_write
from stepdistill.sampling import MANY_STEPS, Sampling
from stepdistill.untrusted import read_json

NAME = "stepdistill.json"
FORMAT = 2
MOST_STUDENTS = 1_000


@dataclass(frozen=True)
class Card:
    """A student's, a trained teacher's or merged students' own facts.

    Attributes:
        kind: "student"; "teacher", a many-step model; "students", several in numbered folders behind `routing`.
        name: for people. family: a name in FAMILIES; "" = told by the pipeline's class. method: that made it.
        sampling: how it is sampled. timesteps: the times of each step count, as it was trained on them.
        teacher: directory or hub id it was distilled from. recipe: the resolved recipe, plain values.
        step, weights: how far the run was, and whether "ema" or "raw" weights these are.
        routing: of a part of the conditions (`routing.router`). students: folders of the parts, in order.
        commit, stepdistill: of the code that wrote it. metrics: measured numbers, by name.
        settings: of the family, beyond what the pipeline says (`Family.settings`).
        revision: the commit at which the teacher was fetched from a hub.
        loras: merged into the teacher before: file, scale and sha256 of each.
    """

    kind: Literal["student", "teacher", "students"] = "teacher"
    name: str = ""
    family: str = ""
    method: str = ""
    sampling: Sampling = MANY_STEPS
    timesteps: dict[str, tuple[float, ...]] = field(default_factory=dict)
    teacher: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    weights: str = "raw"
    routing: dict[str, Any] | None = None
    students: tuple[str, ...] = ()
    commit: str = "unknown"
    stepdistill: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    revision: str = ""
    loras: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for steps, times in self.timesteps.items():
            if not steps.isdecimal() or len(times) != int(steps):
                raise ValueError(f"timesteps must list n times for n steps, got {len(times)} for {steps!r}.")
        if len(self.students) > MOST_STUDENTS:
            raise ValueError(f"students must be at most {MOST_STUDENTS}, got {len(self.students)}.")
        for name in self.students:
            # A folder of this directory, and no way out of it or back to it.
            if not name.isdecimal():
                raise ValueError(f"students must name numbered folders, got {name!r}.")


def read(directory: Path) -> Card | None:
    """The card of a directory; None where it has none, as a teacher from elsewhere.

    Raises:
        UserError: the card is damaged, of a later version, or holds what no card does.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not a JSON object; export the student again.")
    number = content.get("format", 1)
    if number == 1:
        content = _from_format_1(content)
    elif number != FORMAT:
        raise UserError(
            f"{path} is of format {number!r}, and this version reads up to {FORMAT}; update stepdistill."
        )
    try:
        return build(Card, {key: value for key, value in content.items() if key != "format"}, str(path))
    except UserError as error:
        # What a sampling refuses it names as the recipe does.
        raise UserError(str(error) if NAME in str(error) else f"{path}: {error}") from None


def required(directory: Path) -> Card:
    """As `read`, where only a directory of this library will do."""
    card = read(directory)
    if card is None:
        raise UserError(f"{directory} is no student directory: it has no readable {NAME}.")
    return card


def write(card: Card, directory: Path) -> None:
    """Write `stepdistill.json`; what has no value is left out."""
    content = {key: value for key, value in asdict(card).items() if value not in (None, "", (), {})}
    with atomic_write(directory / NAME) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **content}, indent=2) + "\n")


def _from_format_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1's loose fields gathered into a sampling."""
    kept = ("kind", "name", "family", "method", "timesteps", "teacher", "recipe", "step", "weights", "routing",
            "students", "commit", "stepdistill", "metrics")  # fmt: skip
    card = {key: old[key] for key in kept if old.get(key) is not None}
    inputs = tuple(old.get("extras") or ())
    many = card.get("kind", "teacher") == "teacher"
    free = bool(old.get("guidance_free", False))
    card["sampling"] = {
        "steps": old.get("steps") or (),
        "rule": "ode" if many else old.get("rule") or "ode",
        "first_rho": old.get("first_rho") or 0.0,
        "init_noise": old.get("init_noise") or "unit",
        "eta": old.get("eta") or 0.0,
        "finest": 0 if many else old.get("finest") or 0,
        "inputs": inputs,
        "guidance": "input" if "guidance" in inputs else "none" if free else "cfg",
        "scale": 1.0 if old.get("guidance_scale") is None else old["guidance_scale"],
    }
    return card
