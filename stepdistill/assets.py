"""Where the embedded teacher, student, feature net and micro-CLIP lie."""

from __future__ import annotations

from pathlib import Path

from stepdistill.errors import UserError

ROOT = Path(__file__).resolve().parent.parent / "assets"


def path(name: str) -> Path:
    """The directory of an embedded asset: "teacher", "student", "clip" or "scenes-v1".

    Raises:
        UserError: the asset is not there (a partial checkout); `make assets` makes it again.
    """
    found = ROOT / name
    if not found.is_dir():
        raise UserError(f"the embedded asset {name!r} is missing at {found}; run `make assets` to make it.")
    return found
