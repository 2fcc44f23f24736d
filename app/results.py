"""Measured numbers for the page: the rows of a results.json, each with what makes it a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepdistill.untrusted import read_json

# Of an evaluation's metrics, those that the page shows.
SHOWN = ("fd:", "fid", "clip", "attributes/all", "diversity", "latency/ms")


def read(path: Path | None) -> dict[str, Any] | None:
    """The rows of `python -m evaluation run`'s results.json; None where there is none that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        content = read_json(path)
        return {
            **{key: content.get(key) for key in ("protocol", "n", "seeds", "date", "git_commit", "dtype", "warnings")},
            "reference_n": content.get("reference_n"),
            "reference": str(content.get("reference_sha256") or "")[:12],
            "machine": (content.get("machine") or {}).get("cpu"),
            "companion": (content.get("companion") or {}).get("protocol"),
            "rows": [_row(row) for row in content["rows"]],
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        return None


def _row(row: dict[str, Any]) -> dict[str, Any]:
    metrics = {
        name: value
        for name, value in row["metrics"].items()
        if name.startswith(SHOWN) and name.removesuffix("/se").count("/") <= 1 and not name.endswith("ms_p90")
    }
    kept = {key: row.get(key) for key in ("role", "name", "steps", "guidance", "nfe", "n", "sha256")}
    return {**kept, "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)}}
