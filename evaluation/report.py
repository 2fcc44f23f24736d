"""Results as a table for people and as files."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import page, pareto
from evaluation.published import published_beside, published_line
from evaluation.values import readings
from stepdistill.errors import UserError, atomic_write

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("results.html", "results.md", "results.json", "pareto.png")
_ARROWS = {"lower": " ↓", "higher": " ↑", "none": ""}
# Values side by side in one table.
_WIDTH = 9


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
    try:
        published = published_beside(results | {"label": results["protocol"]})
    except UserError:
        # Under another protocol or of another number; nothing published may stand beside these.
        published = []
    for name, content in (
        ("results.json", json.dumps(results, indent=2) + "\n"),
        ("results.md", markdown(results, published)),
        ("results.html", page.render(results, cells(results), facts(results), published, grid)),
    ):
        with atomic_write(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    if worth := pareto.plotted(results):
        name, value = next(iter(worth.items()))
        dots = [(pareto.points(results["rows"], name, cost), cost) for cost in pareto.COSTS]
        with atomic_write(out / "pareto.png") as temporary:
            plots = [(points, cost) for points, cost in dots if len(points) > 1]
            pareto.save_png(plots, name, value.better == "lower", temporary)


def cells(results: dict[str, Any]) -> list[list[list[str]]]:
    """Heading and rows of each table: the main values, then the others that say better or worse, some at a time."""
    read = readings(results)
    main = [name for name, value in read.items() if value.main]
    further = [name for name, value in read.items() if not value.main and value.better != "none"]
    rows = results["rows"]
    about = [("model", pareto.called), ("steps", lambda row: str(row["steps"]))]
    more = [("guidance", lambda row: f"{row['guidance']:g}"), ("NFE", lambda row: str(row["nfe"]))]
    if len({row["n"] for row in rows}) > 1:
        more.append(("n", lambda row: str(row["n"])))
    # There is a first table also where nothing was measured.
    starts = range(0, max(len(main), 1), _WIDTH)
    tables = [([*about, *([] if start else more)], main[start : start + _WIDTH]) for start in starts]
    tables += [(about, further[start : start + _WIDTH]) for start in range(0, len(further), _WIDTH)]
    return [
        [
            [heading for heading, _ in columns] + [f"{name}{_ARROWS[read[name].better]}" for name in names],
            *(
                [cell(row) for _, cell in columns] + [_number(row["metrics"], name) for name in names]
                for row in rows
            ),
        ]
        for columns, names in tables
    ]


def table(results: dict[str, Any]) -> str:
    """The tables for a terminal."""
    text = []
    for lines in cells(results):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        text.append("\n".join([rows[0], "  ".join("-" * width for width in widths), *rows[1:]]))
    return "\n\n".join(text)


def markdown(results: dict[str, Any], published: Sequence[dict[str, Any]] = ()) -> str:
    """The table with everything one needs to repeat it."""
    text = [f"# {results['protocol']}", ""]
    for lines in cells(results):
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        text += [rows[0], "|" + "---|" * len(lines[0]), *rows[1:], ""]
    text += [f"- {fact}" for fact in facts(results)]
    text += [f"- warning: {warning}" for warning in results["warnings"]]
    if pareto.plotted(results):
        text += ["", "![quality against cost](pareto.png)", ""]
    text += [f"- published: {published_line(entry)}" for entry in published]
    return "\n".join(text) + "\n"


def facts(results: dict[str, Any]) -> list[str]:
    """How it was measured, in sentences."""
    extractor, where = results["extractor"], results["machine"]
    sentences = [
        f"protocol `{results['protocol']}` version {results['protocol_version']}, "
        f"hash `{results['protocol_hash']}`; seeds {results['seeds'][0]} to {results['seeds'][1]}",
        "± is one standard error; for distances and their ratio by the jackknife over 10 folds of samples",
        f"{where['device']}, {where['cpu']}, {where['cores']} cores, {where['threads']} threads; "
        f"torch {results['versions']['torch']}, diffusers {results['versions']['diffusers']}",
        f"commit `{results['git_commit']}`, {results['date']}, {results['seconds']:.0f} s:",
        f"`{results['command']}`",
    ]
    if extractor:
        is_fid = extractor["name"].startswith("inception-2015") and not extractor["name"].endswith("-spatial")
        sentences.insert(
            1,
            f"features `{extractor['name']}`, sha256 `{extractor['sha256'][:16]}`"
            + ("" if is_fid else " (this is not FID)"),
        )
    if beside := results.get("companion"):
        kinds = dict.fromkeys(n.partition("/")[0] for n, value in readings(results).items() if value.protocol)
        sentences.insert(
            1,
            f"{', '.join(f'`{kind}`' for kind in kinds)}: protocol `{beside['protocol']}`, hash "
            f"`{beside['protocol_hash']}`; seeds {beside['seeds'][0]} to {beside['seeds'][1]}",
        )
    if any("latency/ms" in row["metrics"] for row in results["rows"]):
        sentences.append(
            "ms/image: batch of one, prompt to pixels, median, all models in turns in one process"
        )
    for row in results["rows"]:
        if row["sweep"]:
            tried = ", ".join(f"{entry['guidance']:g}: {entry['fd']:.3f}" for entry in row["sweep"]["tried"])
            sentences.append(
                f"guidance sweep, {row['name']} at {row['steps']} steps: {tried} (n = {row['sweep']['n']})"
            )
    return sentences


def _number(numbers: dict[str, float | None], name: str) -> str:
    """With as many decimals as its standard error has two significant digits in."""
    value, error = numbers.get(name), numbers.get(f"{name}/se")
    if value is None:
        return ""
    if not error:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
