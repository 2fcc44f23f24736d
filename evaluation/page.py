"""The report as one HTML file that needs nothing else: no library, no network, no other file."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from evaluation import pareto

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

# Side samples are shown at, at most; those of 64 pixels and fewer are shown twice as large.
_THUMB = 160
_SMALL = 64
_HERE = Path(__file__).resolve().parent


def render(
    results: dict[str, Any], tables: Sequence[Sequence[Sequence[str]]], facts: Sequence[str],
    published: Sequence[dict[str, Any]] = (), grid: Sequence[Sequence[Tensor]] = (),
) -> str:  # fmt: skip
    """The page of a results file.

    tables: heading and rows of each. facts: sentences about how it was measured. published: entries that
    may stand beside these results. grid: for each row its first samples, uint8 (3, H, W).
    """
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(loader=FileSystemLoader(_HERE), autoescape=True)
    pages.filters |= {"code": _code, "breakable": _breakable}
    shown = {name: value for name, value in results.items() if name not in ("rows", "warnings")}
    plots = _plots(results)
    names = [line[0] for line in tables[0][1:]]
    images = [[_image(image) for image in line] for line in grid]
    return pages.get_template("report.html.jinja").render(
        results=results, tables=tables, facts=facts, plots=plots,
        legend=pareto.legend(pareto.points(results["rows"], next(iter(plots)), "nfe")) if plots else [], grid=grid,
        grid_rows=zip(results["rows"], names, images, strict=True) if grid else [],
        small=bool(grid) and grid[0][0].shape[-1] <= _SMALL, published=_published(published) if published else None,
        manifest=json.dumps(shown, indent=2, ensure_ascii=False), style=(_HERE / "report.css").read_text(),
        script=(_HERE / "report.js").read_text(),
    )  # fmt: skip


def _plots(results: dict[str, Any]) -> dict[str, list[str]]:
    """An <svg> for each value worth a plot and each cost that is known of two rows."""
    return {
        name: [
            pareto.to_svg(dots, name, cost, value.better == "lower")
            for cost in pareto.COSTS
            if len(dots := pareto.points(results["rows"], name, cost)) > 1
        ]
        for name, value in pareto.plotted(results).items()
    }


def _image(image: Tensor) -> dict[str, Any]:
    """Source and side of an <img> with the pixels in it: PNG while they are few, else a thumbnail as WebP."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    side = picture.width * (2 if picture.width <= _SMALL else 1)
    kind = "png"
    if picture.width > _THUMB:
        picture.thumbnail((2 * _THUMB, 2 * _THUMB), Image.Resampling.LANCZOS)
        side, kind = _THUMB, "webp"
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), quality=90)
    return {
        "side": side,
        "source": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
    }


def _published(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
    return [["model", "steps", *names, "source", "measured by", "differs"]] + [
        [
            entry["model"], str(entry["steps"]), *(f"{entry['metrics'].get(name, '')}" for name in names),
            entry["source"], entry["recipe"], entry.get("differs", ""),
        ]
        for entry in entries
    ]  # fmt: skip


def _code(text: str) -> Markup:
    """A sentence, what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _breakable(heading: str) -> Markup:
    """A heading that may be broken between the parts of a metric's name, but not before its arrow."""
    from markupsafe import Markup, escape

    words = [re.split(r"(?<=[:/])(?=\w{3})", word) for word in re.split(r"(?<=\w) (?=\w)", heading)]
    return Markup(" ".join("<wbr>".join(f"<span>{escape(part)}</span>" for part in word) for word in words))
