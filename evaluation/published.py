"""Published numbers, and which results they may stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from evaluation.protocol import PROTOCOLS
from stepdistill.errors import UserError

PUBLISHED = Path(__file__).resolve().parent / "published.yaml"


def published() -> dict[str, list[dict[str, Any]]]:
    """Published numbers by the hash of the protocol they were measured under."""
    by_hash: dict[str, list[dict[str, Any]]] = {}
    for name, entries in yaml.safe_load(PUBLISHED.read_text()).items():
        by_hash[PROTOCOLS[name].hash] = [entry | {"protocol": name} for entry in entries]
    return by_hash


def published_beside(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Published numbers that the results may stand beside; empty where there are none. Raises UserError if the results
    are of another protocol than any published number, or of fewer samples.
    """
    known = published()
    entries = known.get(results["protocol_hash"])
    if entries is None:
        listed = ", ".join(
            f"{name} ({PROTOCOLS[name].hash})" for name in yaml.safe_load(PUBLISHED.read_text())
        )
        raise UserError(
            f"{results['label']} was measured under {results['protocol']} (hash {results['protocol_hash']}), and "
            f"no published number was: those are of {listed}; numbers of two protocols are not compared."
        )
    full = results.get("protocol_n")
    if results["n"] != full:
        raise UserError(
            f"{results['label']} has {results['n']} samples, but the published numbers have {full}; distances of "
            "different numbers of samples are not compared."
        )
    return entries


def published_line(entry: dict[str, Any]) -> str:
    """A published row for people: the numbers, where they are printed, who measures so, what is done otherwise."""
    numbers = ", ".join(f"{name} {value:g}" for name, value in entry["metrics"].items())
    differs = f"; differs: {entry['differs']}" if "differs" in entry else ""
    steps = f"{entry['steps']} step{'s' if entry['steps'] > 1 else ''}"
    return f"{entry['model']}, {steps}: {numbers} ({entry['source']}; measured by {entry['recipe']}{differs})"
