"""The rows of the fair comparison: measured, and as JSON, tables and a picture."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import students
from benchmarks.students import ROOT, read, write
from stepdistill import assets
from stepdistill.errors import atomic_write
from training.lock import Lock
from training.recipe import load_recipe

# Of sampling steps, those that are measured where the student serves them, with their colours.
COLOURS = {1: "#2563eb", 2: "#d97706", 4: "#16a34a"}
CLIP = "clip:scenes-v1"
# Of the picture's distances.
TICKS = (0.8, 1, 1.25, 1.6, 2, 3, 5, 8, 12, 20)


def measured(student: Path, steps: Sequence[int], folder: Path, n: int) -> dict[str, Any]:
    """Distance, attributes and CLIP score beside the teacher's, how different seeds of a caption are, and a picture."""
    results = folder.parents[1] / "results"
    results.mkdir(exist_ok=True)
    words = ["--steps", ",".join(map(str, steps))]
    # The teacher's samples are drawn once for all.
    lock = Lock(results / "lock")
    lock.wait(lambda: print(f"{folder.name}: waits until another one is measured", flush=True))
    try:
        found = students.measure([student], results, n, "fd,clip,attributes", words)
        # Eight of each caption.
        several = [*words, "--protocol", "scenes-seeds"]
        seeds = students.measure([student], results, 8 * max(2, n // 10), "fd,diversity", several)
        for path in (results / "samples").glob("student-*"):
            shutil.rmtree(path)
        write(results / "teacher.json", next(iter(_kept(found, seeds, "teacher").values())))
    finally:
        lock.release()
    shown = [(folder.name, student, count) for count in steps]
    students.draw([("teacher", ROOT / students.TEACHER, None), *shown], folder / "picture.png")
    about = {key: found[key] for key in ("protocol", "machine", "date")}
    return about | {"steps": _kept(found, seeds, "student")}


def own_judges(recipe: Path) -> list[str]:
    """Measures that look through a network the recipe trains on: they say nothing of its student."""
    seen = {
        Path(one).resolve() for stage in load_recipe(recipe).stages() for one in stage.new_method().trained_on
    }
    return [CLIP] if assets.path("clip").resolve() in seen else []


def _kept(found: dict[str, Any], seeds: dict[str, Any], role: str) -> dict[str, dict[str, float]]:
    """The numbers of one pipeline in two results files, by its number of steps."""
    (rows,), (apart,) = (students.rows_of(results, role).values() for results in (found, seeds))
    return {
        steps: {key: row[key] for key in students.KEPT if key in row}
        | {key: apart[steps][key] for key in students.SEEDS if key in apart[steps]}
        for steps, row in rows.items()
    }


def tabulate(runs: Path, table: Path) -> None:
    """Put the rows of all finished runs into the table, its tables for people and its picture."""
    runs.mkdir(parents=True, exist_ok=True)
    lock = Lock(runs / "lock")
    lock.wait(lambda: None)
    try:
        known = read(table) or {"rows": []}
        finished = [read(path) for path in sorted(runs.glob("*/*/row.json"))]
        rows = {(row["minutes"], row["method"]): row for row in [*known["rows"], *finished]}
        if rows:
            known |= {"teacher": read(runs / "results" / "teacher.json") or known["teacher"]}
            known["rows"] = [rows[key] for key in sorted(rows)]
            write(table, known)
            write(table.with_suffix(".md"), markdown(known))
            plot(known, table.with_suffix(".png"))
    finally:
        lock.release()


def by_budget(table: dict[str, Any]) -> dict[float, list[dict[str, Any]]]:
    """The rows of each budget, the largest first, the best in the fewest steps first."""
    found: dict[float, list[dict[str, Any]]] = {}
    for row in sorted(table["rows"], key=lambda row: (-row["minutes"], min(_ratios(row)))):
        found.setdefault(row["minutes"], []).append(row)
    return found


def _ratios(row: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(steps, distance over the teacher's, its standard error)."""
    return [(int(steps), one["fd_ratio"], one["fd_ratio/se"]) for steps, one in row["steps"].items()]


def markdown(table: dict[str, Any]) -> str:
    """A line for each method; what it has of several numbers of steps in their order, in brackets what its own network says."""
    counts = [f"{steps} step{'s' * (steps > 1)}" for steps in COLOURS]
    heads = ["method", *counts, "attributes all, %", "diversity / teacher's", "CLIP score"]
    heads += ["CPU minutes", "peak MiB", "iterations"]
    parts = []
    for minutes, rows in by_budget(table).items():
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in rows:
            ratios = {steps: f"{ratio:.2f} ± {error:.2f}" for steps, ratio, error in _ratios(row)}
            each = row["steps"].values()
            cells = [row["method"], *(ratios.get(steps, "") for steps in COLOURS)]
            cells += [", ".join(f"{100 * one['attributes/all']:.1f}" for one in each)]
            cells += [", ".join(f"{one[students.DIVERSITY]:.2f}" for one in each)]
            score = ", ".join(f"{one[CLIP]:.1f}" for one in each)
            cells += [f"({score})" if CLIP in row.get("own_judges", ()) else score]
            cells += [f"{row['cpu_seconds'] / 60:.1f}", f"{row['peak_mib']:,.0f}", f"{row['iterations']:,}"]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join([f"**{minutes:g} CPU minutes of one thread**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def plot(table: dict[str, Any], path: Path) -> None:
    """The distance of every method by its number of steps, the budgets below one another."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    budgets = by_budget(table)
    lines = [len(rows) for rows in budgets.values()]
    figure = Figure((6.5, sum(1.0 + 0.24 * count for count in lines)), dpi=150, layout="constrained")
    panels = figure.subplots(
        len(budgets), sharex=True, squeeze=False, height_ratios=[2 + count for count in lines]
    )
    for axes, (minutes, rows) in zip(panels[:, 0], budgets.items(), strict=True):
        for steps, colour in COLOURS.items():
            dots = [(r, place) for place, row in enumerate(rows) for r in _ratios(row) if r[0] == steps]
            if dots:
                (_, values, errors), places = (
                    zip(*(r for r, _ in dots), strict=True),
                    [place for _, place in dots],
                )
                label = f"{steps} step{'s' * (steps > 1)}"
                axes.errorbar(values, places, xerr=errors, fmt="o", color=colour, markersize=5, label=label)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1.0, color="#71717a", linewidth=1)
        axes.grid(True, color="#e4e4e7")
        axes.set_xlabel(f"FD / teacher's after {minutes:g} CPU minutes")
        axes.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
