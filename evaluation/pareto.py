"""Quality against cost: which settings nothing else beats, drawn once for SVG (the page) and PNG (the file).

Cost is the number of denoiser calls (NFE) or milliseconds an image; both axes of cost are logarithmic, and so is
quality where it spans more than a factor of 20. A plot is a list of shapes; two short functions draw them.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 560, 380  # of a plot, in units of the shapes
COSTS = {"nfe": "NFE (denoiser calls an image)", "latency/ms": "ms an image, batch of one"}
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#d97706", "#0891b2", "#be185d", "#4d7c0f")
_INK, _FAINT, _GRID = "#27272a", "#71717a", "#e4e4e7"
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 44, 50
_SPAN = 20  # from this ratio of the largest to the least value on, quality is drawn on a logarithmic axis


@dataclass(frozen=True)
class Point:
    """One setting of one model. `error` is one standard error, 0 where there is none."""

    series: str
    label: str
    cost: float
    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Shape:
    """A polyline ("line"), a filled circle ("dot") or a "text", in a plot's units, y downwards."""

    kind: str
    points: tuple[tuple[float, float], ...]
    colour: str
    size: float = 1.0  # of a line its width, of a dot its radius, of a text its height
    text: str = ""  # of a dot, what it says when pointed at
    anchor: str = "start"
    dashed: bool = False
    series: int | None = None


def lower_is_better(metric: str) -> bool:
    """Distances fall; scores, shares, precision and the like rise."""
    kind, part = metric.partition(":")[0], metric.rpartition("/")[2]
    return kind in ("fd", "fid", "kid", "cmmd", "patch-fd", "fd_ratio") or (
        kind == "paired" and part != "cosine"
    )


def called(row: dict[str, Any]) -> str:
    """What a row of a results file is called: its name, with its role where the name doesn't tell it."""
    name, role = row["name"], row["role"]
    if role in ("student", "model"):
        return name
    return role if role.partition(",")[0] == name else f"{name} ({role})"


def points(rows: Iterable[dict[str, Any]], metric: str, cost: str) -> list[Point]:
    """A point for every row of a results file that has both numbers."""
    found = []
    for row in rows:
        value = row["metrics"].get(metric)
        x = row["nfe"] if cost == "nfe" else row["metrics"].get(cost)
        if value is None or not x:
            continue
        label = f"{called(row)}, {row['steps']} step{'s' if row['steps'] > 1 else ''}"
        found.append(Point(called(row), label, x, value, row["metrics"].get(f"{metric}/se") or 0.0))
    return found


def frontier(found: Sequence[Point], lower: bool = True) -> list[Point]:
    """The points no other one beats: nothing is as cheap and as good, and better in one. Cheapest first."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (p.cost, p.value if lower else -p.value)):
        if not kept or (point.value < kept[-1].value if lower else point.value > kept[-1].value):
            kept.append(point)
    return kept


def plot(found: Sequence[Point], metric: str, cost: str) -> list[Shape]:
    """Axes, a line and dots with error bars for every series, and the frontier dashed."""
    lower = lower_is_better(metric)
    x = _Axis([p.cost for p in found], _LEFT, WIDTH - _RIGHT, log=True)
    ends = [v for p in found for v in (p.value - p.error, p.value + p.error)]
    log = min(ends) > 0 and max(p.value for p in found) > _SPAN * min(p.value for p in found)
    y = _Axis(ends, HEIGHT - _BOTTOM, _TOP, log=log)
    shapes: list[Shape] = []
    for value, name in x.ticks():
        shapes.append(Shape("line", ((x(value), _TOP), (x(value), HEIGHT - _BOTTOM)), _GRID))
        shapes.append(Shape("text", ((x(value), HEIGHT - _BOTTOM + 16),), _FAINT, 11, name, "middle"))
    for value, name in y.ticks():
        shapes.append(Shape("line", ((_LEFT, y(value)), (WIDTH - _RIGHT, y(value))), _GRID))
        shapes.append(Shape("text", ((_LEFT - 8, y(value) + 4),), _FAINT, 11, name, "end"))
    better = "lower is better" if lower else "higher is better"
    shapes.append(Shape("text", ((_LEFT, _TOP - 10),), _INK, 12, f"{metric} ({better})"))
    shapes.append(
        Shape("text", (((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 12),), _INK, 12, COSTS[cost], "middle")
    )
    best = frontier(found, lower)
    if len(best) > 1:
        corners = [(x(best[0].cost), y(best[0].value))]
        for before, after in itertools.pairwise(best):
            corners += [(x(after.cost), y(before.value)), (x(after.cost), y(after.value))]
        shapes.append(Shape("line", tuple(corners), _FAINT, 1.2, dashed=True))
    for index, series in enumerate(dict.fromkeys(p.series for p in found)):
        colour = COLOURS[index % len(COLOURS)]
        own = sorted((p for p in found if p.series == series), key=lambda p: p.cost)
        if len(own) > 1:
            line = tuple((x(p.cost), y(p.value)) for p in own)
            shapes.append(Shape("line", line, colour, 1.6, series=index))
        for point in own:
            at = x(point.cost)
            if point.error:
                bar = ((at, y(point.value - point.error)), (at, y(point.value + point.error)))
                shapes.append(Shape("line", bar, colour, 1.6, series=index))
            error = f" ± {point.error:.2g}" if point.error else ""
            text = f"{point.label}\n{metric} {point.value:.4g}{error}\n{COSTS[cost]}: {point.cost:.4g}"
            shapes.append(Shape("dot", ((at, y(point.value)),), colour, 3.6, text, series=index))
    return shapes


def legend(found: Sequence[Point]) -> list[tuple[str, str]]:
    """(series, colour) in the order they are drawn in."""
    return [(s, COLOURS[i % len(COLOURS)]) for i, s in enumerate(dict.fromkeys(p.series for p in found))]


def to_svg(shapes: Sequence[Shape]) -> str:
    """An <svg> element. Shapes of a series have the class s<number>, dots a <title> that says what they are."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif">']
    for shape in shapes:
        (x, y), series = shape.points[0], f' class="s{shape.series}"' if shape.series is not None else ""
        if shape.kind == "line":
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in shape.points)
            dash = ' stroke-dasharray="5 4"' if shape.dashed else ""
            parts.append(
                f'<polyline{series} points="{path}" fill="none" stroke="{shape.colour}" '
                f'stroke-width="{shape.size}"{dash}/>'
            )
        elif shape.kind == "dot":
            parts.append(
                f'<circle{series} cx="{x:.1f}" cy="{y:.1f}" r="{shape.size}" fill="{shape.colour}" tabindex="0" '
                f'data-says="{html.escape(shape.text).replace(chr(10), "&#10;")}"/>'
            )
        else:
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" font-size="{shape.size}" fill="{shape.colour}" '
                f'text-anchor="{shape.anchor}">{html.escape(shape.text)}</text>'
            )
    return "\n".join([*parts, "</svg>"])


def to_image(
    plots: Sequence[Sequence[Shape]], series: Sequence[tuple[str, str]], scale: int = 2
) -> Image.Image:
    """Plots side by side with their legend below, `scale` pixels a unit, smoothed by drawing twice as large."""
    fine = 2 * scale
    rows = _legend_rows(series, WIDTH * len(plots))
    height = HEIGHT + 20 * len(rows) + 8
    sheet = Image.new("RGB", (WIDTH * len(plots) * fine, height * fine), "white")
    pen = ImageDraw.Draw(sheet)
    for index, shapes in enumerate(plots):
        for shape in shapes:
            _draw(pen, shape, fine, index * WIDTH)
    for row, entries in enumerate(rows):
        for left, name, colour in entries:
            top = HEIGHT + 20 * row + 6
            _draw(pen, Shape("dot", ((left, top),), colour, 4.5), fine)
            _draw(pen, Shape("text", ((left + 10, top + 4),), _INK, 12, name), fine)
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


@dataclass
class _Axis:
    """A scale from values to units, a little wider than the values."""

    values: list[float]
    start: float
    stop: float
    log: bool
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        values = [math.log10(v) for v in self.values] if self.log else self.values
        low, high = min(values), max(values)
        pad = 0.08 * (high - low) or (0.15 if self.log else abs(high) * 0.1 or 1.0)
        self.low, self.high = low - pad, high + pad

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if not self.log:
            return _round_ticks(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
            found = [
                d * 10.0**k
                for k in decades
                for d in digits
                if self.low <= math.log10(d * 10.0**k) <= self.high
            ]
            if len(found) >= 4:
                break
        else:
            found = [value for value, _ in _round_ticks(10**self.low, 10**self.high)]
        return [(value, f"{value:g}") for value in found]


def _round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = math.ceil(low / step)
    return [(i * step, f"{i * step:g}") for i in range(first, math.floor(high / step) + 1)]


def _legend_rows(series: Sequence[tuple[str, str]], width: float) -> list[list[tuple[float, str, str]]]:
    font, rows, left = ImageFont.load_default(12), [[]], float(_LEFT)
    for name, colour in series:
        needed = font.getlength(name) + 34
        if rows[-1] and left + needed > width:
            rows.append([])
            left = float(_LEFT)
        rows[-1].append((left, name, colour))
        left += needed
    return rows


def _draw(pen: ImageDraw.ImageDraw, shape: Shape, scale: int, left: float = 0.0) -> None:
    at = [((x + left) * scale, y * scale) for x, y in shape.points]
    if shape.kind == "dot":
        (x, y), r = at[0], shape.size * scale
        pen.ellipse((x - r, y - r, x + r, y + r), shape.colour)
    elif shape.kind == "text":
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
        pen.text(at[0], shape.text, shape.colour, ImageFont.load_default(shape.size * scale), anchor)
    else:
        width = max(1, round(shape.size * scale))
        for a, b in _dashes(at, 5 * scale, 4 * scale) if shape.dashed else itertools.pairwise(at):
            pen.line((a, b), shape.colour, width)


def _dashes(at: Sequence[tuple[float, float]], on: float, off: float):
    """Pieces of a polyline, `on` long and `off` apart, each corner starting anew."""
    for (x0, y0), (x1, y1) in itertools.pairwise(at):
        length = math.hypot(x1 - x0, y1 - y0)
        done = 0.0
        while done < length:
            a, b = done / length, min(done + on, length) / length
            yield (x0 + (x1 - x0) * a, y0 + (y1 - y0) * a), (x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)
            done += on + off
