"""`python -m evaluation compare`: tables of several runs, what really differs, and published numbers.

Only what was measured alike stands in one table: equal protocol hash, number of samples, extractor weights and
reference. There every sample of one run has its partner in another (same prompt, same noise), so a difference
of distances has a far smaller error than the two distances.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation import report
from evaluation.folds import FoldDistances
from evaluation.published import published_beside, published_line
from evaluation.settings import Place
from stepdistill.errors import UserError
from stepdistill.untrusted import read_regular, readable


def load(path: Place) -> dict[str, Any]:
    """The results of a run, from its directory or its results.json. Raises UserError if there is no such file, or it
    is none of ours.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(read_regular(file))
        if not str(results["format"]).startswith("stepdistill-results-") or not results["rows"]:
            raise KeyError("rows")
    except OSError as error:
        raise UserError(
            f"there are no results at {file} ({error.strerror}); give the --out of a run."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{file} holds no results of `python -m evaluation run`; give the --out of a run."
        ) from None
    return results | {"label": path.resolve().name if path.is_dir() else path.stem}


def identity(results: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs have to agree in before a number of one says anything about a number of the other."""
    extractor = results["extractor"] or {}
    files = results.get("reference_sha256"), results.get("captions_sha256")
    return results["protocol_hash"], results["n"], extractor.get("sha256"), *files


def groups(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that may be compared, together, in the order given."""
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        together.setdefault(identity(run), []).append(run)
    return list(together.values())


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results with the rows of all runs, each named after its run: what the report makes tables of."""
    rows = [row | {"name": f"{run['label']}: {row['name']}"} for run in runs for row in run["rows"]]
    return runs[0] | {"rows": rows}


def differences(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences of the later runs to the first one, of rows with equal role and steps.

    Standard errors are by the delete-one-fold jackknife of the difference: the same fold is left out on both
    sides, which cancels what the samples have in common.
    """
    entries = []
    first, *others = runs
    pairs = [(run, row, base) for run in others for row in run["rows"] for base in first["rows"]]
    for run, row, base in pairs:
        names = sorted(set(row.get("folds") or {}) & set(base.get("folds") or {}))
        for name in names if all(row[key] == base[key] for key in ("role", "steps", "n")) else ():
            ours, theirs = row["folds"][name], base["folds"][name]
            if ours and len(ours) == len(theirs):
                value = row["metrics"][name] - base["metrics"][name]
                left_out = tuple(x - y for x, y in zip(ours, theirs, strict=True))
                entries.append(
                    {
                        "metric": name,
                        "what": f"{run['label']}: {row['name']}",
                        "than": f"{first['label']}: {base['name']}",
                        "role": row["role"],
                        "steps": row["steps"],
                        "difference": value,
                        "se": FoldDistances(value, row["n"], left_out, ()).error,
                    }
                )
    return entries


def text(runs: Sequence[dict[str, Any]], with_published: bool = False) -> str:
    """Everything above as text for a terminal. Raises UserError where the results hold what no run writes."""
    names = ", ".join(run["label"] for run in runs)
    with readable(names, "results of `python -m evaluation run`"):
        return _text(runs, with_published)


def _text(runs: Sequence[dict[str, Any]], with_published: bool) -> str:
    parts = []
    together = groups(runs)
    for group in together:
        names = ", ".join(run["label"] for run in group)
        parts.append(f"{group[0]['protocol']} (hash {group[0]['protocol_hash']}): {names}")
        parts.append(report.table(merged(group)))
        beside = {run["companion"]["protocol"] for run in group if run.get("companion")}
        if len(beside) > 1:
            parts.append(
                f"warning: the seeds' diversity is of {' and '.join(sorted(beside))}; don't compare it."
            )
        if entries := differences(group):
            parts.append("\n".join(map(_said, entries)))
        if with_published:
            lines = [f"  {published_line(entry)}" for entry in published_beside(group[0])]
            parts.append("\n".join(["published under this protocol:", *lines]))
    if len(together) > 1:
        parts.append(
            "warning: these tables are of different protocols, numbers of samples, extractors, references or captions; "
            "don't compare numbers of one with those of another."
        )
    return "\n\n".join(parts)


def _said(entry: dict[str, Any]) -> str:
    apart = abs(entry["difference"])
    size = 0.0 if not apart else apart / entry["se"] if entry["se"] else math.inf
    return (
        f"{entry['metric']}, {entry['steps']} step{'s' if entry['steps'] > 1 else ''}: {entry['what']} minus "
        f"{entry['than']} is {entry['difference']:+.4g} ± {entry['se']:.2g} "
        f"({size:.1f} standard errors{'' if size >= 2 else ': no evidence of a difference'})"
    )
