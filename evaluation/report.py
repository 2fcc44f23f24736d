"""Results as a table for people and as files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import page, pareto
from stepdistill.errors import UserError, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

_OTHERS = (
    "kid:",
    "prdc:",
    "is:",
    "cmmd:",
    "patch-fd:",
    "diversity:",
    "paired:",
)  # shown in a table of their own
_PARTS = (
    "precision",
    "recall",
    "density",
    "coverage",
    "distance",
    "cosine",
    "fd",
    "of_teacher",
)  # of their values
FILES = ("results.html", "results.md", "results.json", "pareto.png")
SHOWN = 8  # samples of every row shown in the report
Cell = Callable[[dict[str, Any], dict[str, float | None]], str]


def check_writable(out: Path) -> None:
    """Raises UserError when nothing can be written into `out`; makes it otherwise."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, FileExistsError) as error:
        raise UserError(
            f"--out {out} cannot be written to ({error.strerror}); give another directory."
        ) from None


def write(results: dict[str, Any], out: Path, grid: Sequence[Sequence[Tensor]] = ()) -> None:
    """Write results.json, results.md, results.html and, where there is something to plot, pareto.png.

    grid: for each row its first samples, uint8 (3, H, W).
    """
    published = _published(results)
    for name, content in (
        ("results.json", json.dumps(results, indent=2) + "\n"),
        ("results.md", markdown(results, published)),
        ("results.html", page.render(results, cells(results), facts(results), published, grid)),
    ):
        with atomic_write(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    if metrics := page.plotted(results["rows"]):
        found = {cost: pareto.points(results["rows"], metrics[0], cost) for cost in pareto.COSTS}
        plots = [pareto.plot(points, metrics[0], cost) for cost, points in found.items() if len(points) > 1]
        with atomic_write(out / "pareto.png") as temporary:
            pareto.to_image(plots, pareto.legend(found["nfe"])).save(temporary, format="PNG", optimize=True)


def _published(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Published numbers that may stand beside these; none where the protocol or the number differs."""
    from evaluation import compare

    try:
        return compare.published_beside(results | {"label": results["protocol"]})
    except UserError:
        return []


def columns(results: dict[str, Any]) -> list[tuple[str, Cell]]:
    """Headings and what stands under them, for the metrics that were computed."""
    measured = {name for row in results["rows"] for name in row["metrics"]}
    found: list[tuple[str, Cell]] = [
        ("model", lambda row, m: pareto.called(row)),
        ("steps", lambda row, m: str(row["steps"])),
        ("guidance", lambda row, m: f"{row['guidance']:g}"),
        ("NFE", lambda row, m: str(row["nfe"])),
    ]
    if len({row["n"] for row in results["rows"]}) > 1:
        found.append(("n", lambda row, m: str(row["n"])))
    for name in sorted(measured):
        if name.startswith(("fd:", "fid:")) and not name.endswith("/se"):
            found.append((f"{name} ↓", _distance(name)))
    if "fd_ratio" in measured:
        found.append(("FD / teacher's", _distance("fd_ratio")))
    if "attributes/all" in measured:
        found.append(("attributes all ↑", _with_error("attributes/all", "{:.1%}")))
    for name in sorted(measured):
        if name.startswith("clip:") and not name.endswith("/se"):
            found.append((f"{name} ↑", _with_error(name, "{:.2f}")))
    if "latency/ms" in measured:
        found.append(("ms/image", lambda row, m: _number(m.get("latency/ms"), "{:.1f}")))
    if "latency/throughput" in measured:
        found.append(("images/s", lambda row, m: _number(m.get("latency/throughput"), "{:.1f}")))
    if "latency/speedup" in measured:
        found.append(
            ("speed-up denoiser", lambda row, m: _number(m.get("latency/speedup_denoise"), "{:.1f}x"))
        )
        found.append(("speed-up end to end", lambda row, m: _number(m.get("latency/speedup"), "{:.1f}x")))
    return found


def further_columns(results: dict[str, Any]) -> list[tuple[str, Cell]]:
    """The same for the metrics beside the usual ones; empty where none was computed."""
    measured = {name for row in results["rows"] for name in row["metrics"]}
    found = []
    for name in sorted(measured):
        kind, _, part = name.rpartition("/")
        if name.startswith(_OTHERS) and (not kind or part in _PARTS):
            found.append((f"{name} {'↓' if pareto.lower_is_better(name) else '↑'}", _distance(name)))
    return [*columns(results)[:2], *found] if found else []


def cells(results: dict[str, Any]) -> list[list[list[str]]]:
    """Heading and rows of each table: the usual metrics, and the further ones if there are any."""
    return [
        [[heading for heading, _ in shown]]
        + [[cell(row, row["metrics"]) for _, cell in shown] for row in results["rows"]]
        for shown in (columns(results), further_columns(results))
        if shown
    ]


def table(results: dict[str, Any]) -> str:
    """The tables for a terminal."""
    return "\n\n".join(map(_aligned, cells(results)))


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def markdown(results: dict[str, Any], published: Sequence[dict[str, Any]] = ()) -> str:
    """The table with everything one needs to repeat it."""
    text = [f"# {results['protocol']}", ""]
    for lines in cells(results):
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        text += [rows[0], "|" + "---|" * len(lines[0]), *rows[1:], ""]
    text += [f"- {fact}" for fact in facts(results)]
    text += [f"- warning: {warning}" for warning in results["warnings"]]
    if page.plotted(results["rows"]):
        text += ["", "![quality against cost](pareto.png)", ""]
    for entry in published:
        numbers = ", ".join(f"{name} {value:g}" for name, value in entry["metrics"].items())
        differs = f"; differs: {entry['differs']}" if "differs" in entry else ""
        text.append(
            f"- published: {entry['model']}, {entry['steps']} steps: {numbers} ({entry['source']}{differs})"
        )
    return "\n".join(text) + "\n"


def facts(results: dict[str, Any]) -> list[str]:
    """How it was measured, in sentences."""
    extractor, where = results["extractor"], results["machine"]
    found = [
        f"protocol `{results['protocol']}` version {results['protocol_version']}, "
        f"hash `{results['protocol_hash']}`; seeds {results['seeds'][0]} to {results['seeds'][1]}",
        "± is one standard error; for distances and ratios by the jackknife over 10 folds of samples",
        f"{where['device']}, {where['cpu']}, {where['cores']} cores, {where['threads']} threads; "
        f"torch {results['versions']['torch']}, diffusers {results['versions']['diffusers']}",
        f"commit `{results['git_commit']}`, {results['date']}, {results['seconds']:.0f} s:",
        f"`{results['command']}`",
    ]
    if extractor:
        is_fid = extractor["name"].startswith("inception-2015")
        found.insert(
            1,
            f"features `{extractor['name']}`, sha256 `{extractor['sha256'][:16]}`"
            + ("" if is_fid else " (this is not FID)"),
        )
    if any("latency/ms" in row["metrics"] for row in results["rows"]):
        found.append("ms/image: batch of one, prompt to pixels, median, all models in turns in one process")
    for row in results["rows"]:
        if row["sweep"]:
            tried = ", ".join(f"{entry['guidance']:g}: {entry['fd']:.3f}" for entry in row["sweep"]["tried"])
            found.append(
                f"guidance sweep, {row['name']} at {row['steps']} steps: {tried} (n = {row['sweep']['n']})"
            )
    return found


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _distance(name: str) -> Cell:
    """With as many decimals as its standard error has two significant digits in."""

    def cell(row: dict[str, Any], metrics: dict[str, float | None]) -> str:
        value, error = metrics.get(name), metrics.get(f"{name}/se")
        if value is None:
            return ""
        if not error:
            return f"{value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(error)))
        return f"{value:.{decimals}f} ± {error:.{decimals}f}"

    return cell


def _with_error(name: str, form: str) -> Cell:
    def cell(row: dict[str, Any], metrics: dict[str, float | None]) -> str:
        value, error = metrics.get(name), metrics.get(f"{name}/se")
        return _number(value, form) + (
            f" ± {form.format(error)}" if value is not None and error is not None else ""
        )

    return cell
