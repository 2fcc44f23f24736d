"""The report: the frontier is one, the plots show what the numbers say, and the page needs nothing else."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from evaluation import compare, page, pareto, report
from evaluation.protocol import PROTOCOLS
from evaluation.values import readings


def row(role: str, steps: int, fd: float, ms: float | None, **metrics: float) -> dict:
    found = {"fd:tiny": fd, "fd:tiny/se": 0.1} | metrics
    if ms is not None:
        found["latency/ms"] = ms
    return {"role": role, "name": role.partition(",")[0], "steps": steps, "guidance": 1.0, "nfe": steps, "n": 40,
            "metrics": found, "sweep": None}  # fmt: skip


def results(**changes) -> dict:
    coco = PROTOCOLS["coco14-30k"]
    rows = [row("teacher", 50, 3.0, 900.0), row("teacher, few steps", 4, 90.0, 80.0), row("student", 4, 4.0, 60.0),
            row("student", 1, 5.0, 25.0)]  # fmt: skip
    return {
        "protocol": "coco14-30k", "protocol_version": 1, "protocol_hash": coco.hash, "protocol_n": 30_000, "n": 30_000,
        "seeds": [0, 39], "extractor": {"name": "tiny", "sha256": "ab" * 32}, "rows": rows, "date": "today",
        "machine": {"device": "cpu", "cpu": "a cpu", "cores": 2, "threads": 1}, "git_commit": "c0ffee", "seconds": 1.0,
        "versions": {"torch": "2", "diffusers": "0"}, "command": "evaluation run", "warnings": ["a < warning"],
        "prompts": ["<b>bold</b> & a star", "two"],
    } | changes  # fmt: skip


# -------------------------------------------------------------------------------- plots


def test_the_frontier_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    for lower in (True, False):
        points = [pareto.Point("s", "p", float(c), float(v)) for c, v in rng.integers(1, 12, (60, 2))]

        def beats(a: pareto.Point, b: pareto.Point, sign: int = 1 if lower else -1) -> bool:
            better = sign * (b.value - a.value)
            return (a.cost <= b.cost and better >= 0) and (a.cost < b.cost or better > 0)

        best = pareto.frontier(points, lower)
        assert not any(beats(other, kept) for other in points for kept in best)
        assert all(
            any(beats(kept, p) or (kept.cost, kept.value) == (p.cost, p.value) for kept in best)
            for p in points
        )
        assert [p.cost for p in best] == sorted({p.cost for p in best})


def test_points_take_what_a_row_has() -> None:
    rows = [row("student", 1, 5.0, 20.0), row("student", 2, 4.0, None)]
    assert [p.cost for p in pareto.points(rows, "fd:tiny", "nfe")] == [1, 2]
    (only,) = pareto.points(rows, "fd:tiny", "latency/ms")
    assert (only.cost, only.value, only.error) == (20.0, 5.0, 0.1)
    assert pareto.points(rows, "clip:tiny", "nfe") == []


def drawn(found: list[pareto.Point], lower: bool = True) -> tuple[Axes, dict[str, str]]:
    axes = Figure().subplots()
    return axes, pareto.draw(axes, found, "fd:tiny", "nfe", lower)


def test_a_plot_keeps_the_numbers_and_its_frontier() -> None:
    found = pareto.points(results()["rows"], "fd:tiny", "nfe")
    axes, says = drawn(found)
    dots = {says[line.get_gid()].splitlines()[0]: line for line in axes.lines if line.get_gid() in says}
    for point in found:
        assert dots[point.label].get_xydata().tolist() == [[point.cost, point.value]]
    (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    best = {point.label for point in found if [point.cost, point.value] in dashed.get_xydata().tolist()}
    assert best == {"student, 1 step", "student, 4 steps", "teacher, 50 steps"}
    colours = [
        dots[label].get_color() for label in ("teacher, 50 steps", "student, 1 step", "student, 4 steps")
    ]
    assert colours[0] != colours[1] == colours[2]


@pytest.mark.parametrize(
    "values", [(1.0, 1.0), (2.0, 300.0), (2.4, 73.0), (-1.0, 1.0), (0.0, 0.5), (1e-6, 2e-6)]
)
def test_axes_show_any_values(values) -> None:
    found = [pareto.Point("s", "p", 10.0 ** (3 * i), value, 0.1) for i, value in enumerate(values)]
    axes, _ = drawn(found)
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    assert all(low < value < high for value in values) and left < 1 and right > 1000
    assert len(axes.get_yticks()) >= 2 and len(axes.get_xticks()) >= 2
    FigureCanvasAgg(axes.figure).draw()
    for axis in (axes.xaxis, axes.yaxis):
        # Plain numbers alone: no powers of ten between them.
        assert all(not label.get_text() for label in axis.get_minorticklabels())
        assert not any("10^" in label.get_text() for label in axis.get_majorticklabels())


def test_svg_is_well_formed_and_says_what_its_dots_are() -> None:
    found = [pareto.Point('a <"b">', 'a <"b">, 1 step', 1, 2.0, 0.5), pareto.Point("c", "c, 2 steps", 2, 1.0)]
    tree = ElementTree.fromstring(pareto.to_svg(found, "fd:tiny", "nfe"))
    names = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in tree.iter(f"{names}title")]
    assert titles[0].startswith('a <"b">, 1 step\nfd:tiny 2 ± 0.5') and len(titles) == 2
    classes = [group.get("class") for group in tree.iter(f"{names}g") if group.get("class")]
    assert {"s0", "s1"} == set(classes) and pareto.to_svg(found, "fd:tiny", "nfe") == pareto.to_svg(
        found, "fd:tiny", "nfe"
    )


def test_the_picture_has_every_series_in_its_colour(tmp_path) -> None:
    found = pareto.points(results()["rows"], "fd:tiny", "nfe")
    pareto.save_png([(found, "nfe")] * 2, "fd:tiny", True, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(pareto.legend(found)) == 3
    for _, colour in pareto.legend(found):
        want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        for half in (pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]):
            assert (np.abs(half.astype(int) - want).max(-1) < 8).sum() > 30


def test_numbers_of_older_files_are_read_as_their_metrics_declare_them() -> None:
    names = {"fd:x/infinity": 1, "fid:inception-2015": 1, "kid:x": 1, "cmmd:x": 1, "clip:x": 1, "prdc:x/recall": 1,
             "attributes/all": 1, "is:x": 1, "fd_ratio": 1, "paired:x/cosine": 1, "fd_ratio/n": 1, "own": 1}  # fmt: skip
    read = readings({"rows": [{"metrics": names}]})
    assert {name: value.better for name, value in read.items()} == {
        "fd:x/infinity": "lower", "fid:inception-2015": "lower", "kid:x": "lower", "cmmd:x": "lower",
        "clip:x": "higher", "prdc:x/recall": "higher", "attributes/all": "higher", "is:x": "higher",
        "fd_ratio": "lower", "paired:x/cosine": "higher", "fd_ratio/n": "none", "own": "none",
    }  # fmt: skip
    assert {name for name, value in read.items() if value.main} == set(names) - {
        "paired:x/cosine",
        "fd_ratio/n",
        "own",
    }


def test_result_files_of_the_first_format_still_make_tables() -> None:
    runs = [
        compare.load(Path(__file__).parents[2] / "benchmarks" / name)
        for name in ("cifar10.json", "cifar10_36.json")
    ]
    text = compare.text(runs)
    assert "fd:cifar10-v1 ↓" in text and "±" in text


# -------------------------------------------------------------------------------- files


def written(tmp_path: Path, side: int = 16, **changes) -> tuple[str, str]:
    images = torch.randint(0, 256, (4, 2, 3, side, side), dtype=torch.uint8)
    report.write(results(**changes), tmp_path, [list(line) for line in images])
    return (tmp_path / "results.html").read_text(), (tmp_path / "results.md").read_text()


def test_the_page_is_one_file_and_escapes_what_it_shows(tmp_path) -> None:
    shown, _ = written(tmp_path)
    assert (
        "&lt;b&gt;bold&lt;/b&gt; &amp; a star" in shown
        and "<b>bold" not in shown
        and "a &lt; warning" in shown
    )
    # No other file is asked for; what a namespace is called, and marks within the page, are none.
    assert not re.findall(r'(?:src|href)="(?!data:|#)', shown) and "@import" not in shown
    assert not re.findall(
        r'(?<!xmlns=")(?<!xmlns:xlink=")https?://(?!www.w3.org/TR/SVG)', shown.partition("<details>")[0]
    )
    assert shown.count("data:image/png;base64,") == 8 and shown.count("<svg") == 2
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["nfe"] == 50
    with Image.open(tmp_path / "pareto.png") as image:
        assert image.width > 2 * image.height


def test_samples_are_kept_exactly_while_small_and_shrunk_when_large() -> None:
    import base64

    small = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    data = page._image(small)["source"].partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert np.array_equal(np.asarray(image), small.permute(1, 2, 0).numpy())
    assert "image/webp" in page._image(torch.zeros(3, 512, 512, dtype=torch.uint8))["source"]


@pytest.mark.usefixtures("no_plots")
def test_published_numbers_stand_beside_their_protocol_only(tmp_path) -> None:
    for changes, there in (({}, True), ({"n": 500}, False), ({"protocol_hash": "0"}, False)):
        shown, text = written(tmp_path, **changes)
        assert ("DMD2, SD 1.5" in shown) == ("published: DMD2, SD 1.5, 1 step: fid 8.35" in text) == there


@pytest.mark.usefixtures("no_plots")
def test_the_page_says_what_is_fid_and_what_not(tmp_path) -> None:
    assert "this is not FID" in written(tmp_path)[0]
    assert "not FID" not in written(tmp_path, extractor={"name": "inception-2015", "sha256": "0" * 64})[1]


@pytest.mark.usefixtures("no_plots")
def test_what_is_not_a_main_value_has_a_table_of_its_own(tmp_path) -> None:
    extra = {
        "kid:tiny": 0.5,
        "kid:tiny/se": 0.01,
        "kid:tiny/subsets": 0.4,
        "prdc:tiny/recall": 0.9,
        "fd_ratio/n": 9,
    }
    report.write(results(rows=[row("student", 1, 5.0, 3.0, **extra), row("teacher", 9, 4.0, 9.0)]), tmp_path)
    shown, text = ((tmp_path / name).read_text() for name in ("results.html", "results.md"))
    assert 'id="further"' in shown
    usual, further = report.cells(json.loads((tmp_path / "results.json").read_text()))
    assert usual[0][4:] == ["fd:tiny ↓", "kid:tiny ↓", "prdc:tiny/recall ↑", "latency/ms ↓"]
    assert usual[1][4:] == ["5.00 ± 0.10", "0.500 ± 0.010", "0.9", "3"] and usual[2][5:7] == ["", ""]
    assert further == [
        ["model", "steps", "kid:tiny/subsets ↓"],
        ["student", "1", "0.4"],
        ["teacher", "9", ""],
    ]
    assert "| student | 1 | 0.4 |" in text


def test_a_row_is_called_by_its_name_and_role_once() -> None:
    told = [
        ("a", "student"),
        ("a", "model"),
        ("teacher", "teacher"),
        ("teacher", "teacher, few steps"),
        ("sd", "teacher"),
    ]
    found = [pareto.called({"name": name, "role": role}) for name, role in told]
    assert found == ["a", "a", "teacher", "teacher, few steps", "sd (teacher)"]


def test_one_row_and_no_latency_need_no_plot(tmp_path) -> None:
    report.write(results(rows=[row("student", 1, 5.0, None)]), tmp_path)
    assert "<svg" not in (tmp_path / "results.html").read_text() and not (tmp_path / "pareto.png").exists()
