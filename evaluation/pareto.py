"""Quality against cost: which settings nothing else beats, as SVG (the page) and PNG (the file).

Cost is the number of denoiser calls (NFE) or milliseconds an image; both axes of cost are logarithmic, and so is
quality where it spans more than a factor of 20.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.values import Value, readings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COSTS = {"nfe": "NFE (denoiser calls an image)", "latency/ms": "ms an image, batch of one"}
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#d97706", "#0891b2", "#be185d", "#4d7c0f")
_FAINT, _GRID = "#71717a", "#e4e4e7"
# From this ratio of the largest to the least value on, quality is drawn on a logarithmic axis.
_SPAN = 20
_SIZE = (5.6, 3.8)
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Point:
    """One setting of one model. `error` is one standard error, 0 where there is none."""

    series: str
    label: str
    cost: float
    value: float
    error: float = 0.0


def called(row: dict[str, Any]) -> str:
    """What a row of a results file is called: its name, with its role where the name doesn't tell it."""
    name, role = row["name"], row["role"]
    if role in ("student", "model"):
        return name
    return role if role.partition(",")[0] == name else f"{name} ({role})"


def points(rows: Iterable[dict[str, Any]], metric: str, cost: str) -> list[Point]:
    """A point for every row of a results file that has both numbers."""
    dots = []
    for row in rows:
        value = row["metrics"].get(metric)
        x = row["nfe"] if cost == "nfe" else row["metrics"].get(cost)
        if value is None or not x:
            continue
        label = f"{called(row)}, {row['steps']} step{'s' if row['steps'] > 1 else ''}"
        dots.append(Point(called(row), label, x, value, row["metrics"].get(f"{metric}/se") or 0.0))
    return dots


def plotted(results: Mapping[str, Any]) -> dict[str, Value]:
    """The main values of at least two rows, in the order measured; those of time are costs, not qualities."""
    times = {cost.partition("/")[0] for cost in COSTS}
    return {
        name: value
        for name, value in readings(results).items()
        if value.main
        and value.better != "none"
        and name.partition("/")[0] not in times
        and len(points(results["rows"], name, "nfe")) > 1
    }


def frontier(dots: Sequence[Point], lower: bool = True) -> list[Point]:
    """The points no other one beats: nothing is as cheap and as good, and better in one. Cheapest first."""
    kept: list[Point] = []
    for point in sorted(dots, key=lambda p: (p.cost, p.value if lower else -p.value)):
        if not kept or (point.value < kept[-1].value if lower else point.value > kept[-1].value):
            kept.append(point)
    return kept


def legend(dots: Sequence[Point]) -> list[tuple[str, str]]:
    """(series, colour) in the order they are drawn in."""
    return [(s, COLOURS[i % len(COLOURS)]) for i, s in enumerate(dict.fromkeys(p.series for p in dots))]


def draw(axes: Axes, dots: Sequence[Point], metric: str, cost: str, lower: bool) -> dict[str, str]:
    """Axes, a line and dots with error bars for every series, and the frontier dashed.

    Every artist of series i has the id "s<i>"; returns what each dot, by its own id, says when pointed at.
    """
    values = [p.value for p in dots]
    axes.set_xscale("log")
    _in_ones_twos_fives(axes.xaxis)
    if min(p.value - p.error for p in dots) > 0 and max(values) > _SPAN * min(values):
        axes.set_yscale("log")
        _in_ones_twos_fives(axes.yaxis)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{metric} ({'lower' if lower else 'higher'} is better)", loc="left", fontsize=9)
    axes.set_xlabel(COSTS[cost], fontsize=9)
    axes.grid(True, color=_GRID)
    axes.tick_params(labelsize=8, colors=_FAINT)
    best = frontier(dots, lower)
    axes.step(
        [p.cost for p in best], [p.value for p in best], "--", where="post", color=_FAINT, linewidth=1.2
    )
    says: dict[str, str] = {}
    for index, (series, colour) in enumerate(legend(dots)):
        own = sorted((p for p in dots if p.series == series), key=lambda p: p.cost)
        bars = axes.errorbar(
            [p.cost for p in own], [p.value for p in own], [p.error for p in own], color=colour, linewidth=1.6,
            label=series,
        )  # fmt: skip
        for artist in (bars.lines[0], *bars.lines[2]):
            artist.set_gid(f"s{index}")
        for number, point in enumerate(own):
            name, error = f"s{index}-{number}", f" ± {point.error:.2g}" if point.error else ""
            says[name] = f"{point.label}\n{metric} {point.value:.4g}{error}\n{COSTS[cost]}: {point.cost:.4g}"
            axes.plot([point.cost], [point.value], "o", color=colour, markersize=6, gid=name)
    return says


def _in_ones_twos_fives(axis: Axis) -> None:
    """The ticks of a logarithmic axis, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def to_svg(dots: Sequence[Point], metric: str, cost: str, lower: bool = True) -> str:
    """An <svg> element. Groups of series i have the class "s<i>", those of dots a <title> that says what they are."""
    import matplotlib
    from matplotlib.figure import Figure

    figure, buffer = Figure(_SIZE), io.StringIO()
    figure.subplots_adjust(left=0.13, right=0.97, top=0.91, bottom=0.14)
    says = draw(figure.subplots(), dots, metric, cost, lower)
    # Text stays text, and ids depend on what is drawn alone.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{metric} {cost}"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    for node in root.iter(f"{{{_SVG}}}g"):
        name = node.get("id", "")
        series, dash, _ = name.partition("-")
        if series[:1] == "s" and series[1:].isdigit():
            node.set("class", series)
            del node.attrib["id"]
        if dash and name in says:
            title = ElementTree.SubElement(node, f"{{{_SVG}}}title")
            title.text = says[name]
    for node in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(node)
    return ElementTree.tostring(root, encoding="unicode")


def save_png(plots: Sequence[tuple[Sequence[Point], str]], metric: str, lower: bool, path: Path) -> None:
    """(points, cost) of each plot side by side, with one legend below, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure((_SIZE[0] * len(plots), _SIZE[1] + 0.3), dpi=200, layout="constrained")
    row = figure.subplots(1, len(plots), squeeze=False)[0]
    for axes, (dots, cost) in zip(row, plots, strict=True):
        draw(axes, dots, metric, cost, lower)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png")
