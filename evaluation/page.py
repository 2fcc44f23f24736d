"""The report as one HTML file that needs nothing else: no library, no network, no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from evaluation import pareto

if TYPE_CHECKING:
    from torch import Tensor

_THUMB = 160  # side samples are shown at, at most; those of 64 pixels and fewer are shown twice as large
_SMALL = 64

_STYLE = """
:root { color-scheme: light dark; --ink: #18181b; --faint: #71717a; --line: #e4e4e7; --paper: #fff; --warn: #fef3c7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f4f4f5; --faint: #a1a1aa; --line: #3f3f46; --paper: #18181b; --warn: #422006; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1320px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; font-size: 1.15rem; }
.faint { color: var(--faint); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } table[id] th { cursor: pointer; white-space: normal;
  vertical-align: bottom; line-height: 1.25; } th span { white-space: nowrap; }
table[id] { margin-bottom: 1rem; } code { background: color-mix(in srgb, var(--line) 50%, transparent);
  padding: 0 .25em; border-radius: 3px; font-size: .92em; }
ul.warnings { background: var(--warn); padding: .7rem 2rem; border-radius: 6px; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { width: 560px; max-width: 100%; background: #fff;
  border-radius: 6px; }
.keys button { border: 0; background: none; color: inherit; cursor: pointer; font: inherit; padding: .1rem .6rem; }
.keys button[aria-pressed=false] { opacity: .35; } .keys i { display: inline-block; width: .8em; height: .8em;
  border-radius: 50%; margin-right: .4em; }
circle { cursor: pointer; } circle:hover, circle:focus { stroke: #18181b; stroke-width: 2; outline: none; }
#says { position: fixed; pointer-events: none; background: #18181b; color: #fff; padding: .4rem .7rem;
  border-radius: 5px; white-space: pre; font-size: 13px; display: none; z-index: 1; }
.samples td { border: 0; padding: 2px; } .samples img { display: block; border-radius: 3px; }
.samples td:first-child { padding-right: 1rem; } .pixels img { image-rendering: pixelated; }
.samples th { max-width: 128px; white-space: normal; font-weight: normal; font-size: 11px; line-height: 1.25;
  text-align: left; vertical-align: bottom; border: 0; padding: 2px; color: var(--faint); }
pre { overflow-x: auto; background: color-mix(in srgb, var(--line) 40%, transparent); padding: .8rem; border-radius: 6px; }
"""

_SCRIPT = """
const all = (s, root = document) => [...root.querySelectorAll(s)];
const metric = document.getElementById('metric'), says = document.getElementById('says');
const choose = () => all('[data-metric]').forEach(p => p.hidden = p.dataset.metric !== metric.value);
if (metric) { metric.onchange = choose; choose(); }
all('.keys button').forEach(b => b.onclick = () => {
  const on = b.ariaPressed !== 'true'; b.ariaPressed = on;
  all('.s' + b.value).forEach(e => e.style.display = on ? '' : 'none'); });
all('circle').forEach(c => {
  c.onmousemove = c.onfocus = e => { const r = c.getBoundingClientRect(); says.textContent = c.dataset.says;
    says.style.cssText = `display:block;left:${Math.min(r.x + 14, innerWidth - 280)}px;top:${r.y + 14}px`; };
  c.onmouseleave = c.onblur = () => says.style.display = 'none'; });
all('table[id]').forEach(table => all('th', table).forEach((th, column) => th.onclick = () => {
  const body = th.closest('table').tBodies[0], up = th.dataset.up = th.dataset.up === '1' ? '' : '1';
  const key = row => { const t = row.cells[column].textContent, x = parseFloat(t); return isNaN(x) ? t : x; };
  [...body.rows].sort((a, b) => (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * (up ? 1 : -1))
    .forEach(row => body.append(row)); }));
"""


def render(
    results: dict[str, Any], tables: Sequence[Sequence[Sequence[str]]], facts: Sequence[str],
    published: Sequence[dict[str, Any]] = (), grid: Sequence[Sequence[Tensor]] = (),
) -> str:  # fmt: skip
    """The page of a results file.

    tables: heading and rows of each. facts: sentences about how it was measured. published: entries that
    may stand beside these results. grid: for each row its first samples, uint8 (3, H, W).
    """
    title = html.escape(results["protocol"])
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<p class="faint">protocol hash {results["protocol_hash"]}, {results["n"]:,} samples, {results["date"]}</p>',
    ]
    if results["warnings"]:
        parts.append(_list(results["warnings"], "warnings"))
    for index, cells in enumerate(tables):
        parts += ['<div class="scroll">', _table(cells, "further" if index else "results"), "</div>"]
    parts.append('<p class="faint">± is one standard error. Click a heading to sort.</p>')
    parts += _plots(results["rows"])
    if grid:
        parts += _samples(results, tables[0], grid)
    if published:
        parts += ["<h2>Published under this protocol</h2>", _published(published)]
    parts += ["<h2>How it was measured</h2>", _list(facts)]
    shown = {name: value for name, value in results.items() if name not in ("rows", "warnings")}
    parts += [
        "<details><summary>The whole manifest</summary>",
        f"<pre>{html.escape(json.dumps(shown, indent=2, ensure_ascii=False))}</pre></details>",
        f'<div id="says"></div><script>{_SCRIPT}</script></body></html>',
    ]
    return "\n".join(parts) + "\n"


def plotted(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Metrics worth a plot: distances, scores and shares that at least two rows have."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    wanted = [
        name
        for name in names
        if not name.endswith(("/se", "/n")) and not name.startswith("latency/")
        and ("/" not in name or name.endswith(("attributes/all", "/precision", "/recall", "/distance")))
        and len(pareto.points(rows, name, "nfe")) > 1
    ]  # fmt: skip
    return sorted(wanted, key=lambda name: (not name.startswith(("fd:", "fid")), name))


def _plots(rows: Sequence[dict[str, Any]]) -> list[str]:
    metrics = plotted(rows)
    if not metrics:
        return []
    options = "".join(f"<option>{html.escape(name)}</option>" for name in metrics)
    parts = [
        "<h2>Quality against cost</h2>",
        f'<p><select id="metric">{options}</select></p>',
        '<div class="plots">',
    ]
    for name in metrics:
        for cost in pareto.COSTS:
            if len(found := pareto.points(rows, name, cost)) > 1:
                svg = pareto.to_svg(pareto.plot(found, name, cost))
                parts.append(f'<div data-metric="{html.escape(name)}">{svg}</div>')
    keys = [
        f'<button value="{index}" aria-pressed="true"><i style="background:{colour}"></i>{html.escape(series)}</button>'
        for index, (series, colour) in enumerate(pareto.legend(pareto.points(rows, metrics[0], "nfe")))
    ]
    parts += ["</div>", f'<p class="keys">{"".join(keys)}</p>']
    parts.append('<p class="faint">Nothing measured is both cheaper and better than the dashed line. Bars are one '
                 "standard error; point at a dot for its numbers, click a name to hide it.</p>")  # fmt: skip
    return parts


def _samples(
    results: dict[str, Any], cells: Sequence[Sequence[str]], grid: Sequence[Sequence[Tensor]]
) -> list[str]:
    small = grid[0][0].shape[-1] <= _SMALL
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in results["prompts"][: len(grid[0])])
    parts = [
        "<h2>The first samples</h2>",
        f'<div class="scroll"><table class="samples{" pixels" if small else ""}">',
    ]
    parts.append(f"<tr><th></th>{heads}</tr>")
    for row, line, images in zip(results["rows"], cells[1:], grid, strict=True):
        shown = "".join(f"<td>{_image(image)}</td>" for image in images)
        steps = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
        parts.append(f'<tr><td>{html.escape(line[0])}<br><span class="faint">{steps}</span></td>{shown}</tr>')
    return [*parts, "</table></div>"]


def _image(image: Tensor) -> str:
    """An <img> with the pixels in it: PNG while they are few, else a thumbnail as WebP."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    side = picture.width * (2 if picture.width <= _SMALL else 1)
    kind = "png"
    if picture.width > _THUMB:
        picture.thumbnail((2 * _THUMB, 2 * _THUMB), Image.Resampling.LANCZOS)
        side, kind = _THUMB, "webp"
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{side}" alt="" src="data:image/{kind};base64,{data}">'


def _table(cells: Sequence[Sequence[str]], name: str) -> str:
    head = "".join(f"<th>{_breakable(cell)}</th>" for cell in cells[0])
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in cells[1:]]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _breakable(heading: str) -> str:
    """A heading that may be broken between the parts of a metric's name, but not before its arrow."""
    words = [re.split(r"(?<=[:/])(?=\w{3})", word) for word in re.split(r"(?<=\w) (?=\w)", heading)]
    return " ".join("<wbr>".join(f"<span>{html.escape(part)}</span>" for part in word) for word in words)


def _published(entries: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
    cells = [["model", "steps", *names, "source", "differs"]] + [
        [
            entry["model"], str(entry["steps"]), *(f"{entry['metrics'].get(name, '')}" for name in names),
            entry["source"], entry.get("differs", ""),
        ]
        for entry in entries
    ]  # fmt: skip
    return f'<div class="scroll">{_table(cells, "published")}</div>'


def _list(sentences: Sequence[str], name: str = "") -> str:
    shown = (re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text)) for text in sentences)
    items = "".join(f"<li>{text}</li>" for text in shown)
    return f'<ul class="{name}">{items}</ul>'
