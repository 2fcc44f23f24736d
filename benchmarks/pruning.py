"""Quality against size and latency of a teacher with intervals of blocks plugged in and out, without training between.

    python -m training.prune training/recipes/transformer_prune.yaml      (docs/pruning.md; leaves runs/transformer_prune)
    python -m benchmarks.pruning assets/transformer runs/transformer_prune/student/intervals
    python -m benchmarks.pruning TEACHER INTERVALS --further runs/transformer_prune_healed/student

Rows: the teacher; each interval by itself; intervals added one after another, those of least harm first; and directories
that are given as they are, such as a healed network or a one-step student of it. The same captions and seeds for all, and
latencies in turns within one process. Results: benchmarks/pruning.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError, atomic_write, cli_errors, quieten_libraries
from stepdistill.provenance import git_commit

TABLE = Path(__file__).with_suffix(".json")
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="a pipeline directory")
    parser.add_argument("intervals", type=Path, help="files of its intervals, a directory")
    parser.add_argument(
        "--further", type=Path, nargs="*", default=[], help="directories measured as they are"
    )
    parser.add_argument("--n", type=int, default=1000, help="samples measured (1000)")
    parser.add_argument("--steps", type=int, default=25, help="of many-step networks (25)")
    parser.add_argument("--guidance", type=float, default=2.0, help="of many-step networks (2)")
    parser.add_argument("--timed", type=int, default=5, help="images by which latency is measured (5)")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes, .json")
    given = parser.parse_args()
    with cli_errors():
        quieten_libraries()
        rows, images = measured(given)
        save(given, rows)
        draw(images, given.out.with_suffix(".png"))
        print(given.out.with_suffix(".md").read_text())


def subsets(folder: Path) -> list[tuple[str, list[Path]]]:
    """Each interval by itself, and then one more after another, in the order of their harm where a run left it."""
    from stepdistill.pruning import files

    paths = files(folder)
    report = folder.parents[1] / "intervals.json"
    harm = {}
    if report.is_file():
        # An interval that was cut short begins where the one that was found does.
        harm = {
            each["interval"].rsplit("-", 1)[0]: each["harm"]
            for each in json.loads(report.read_text())["found"]
        }
    paths.sort(key=lambda path: harm.get(path.stem.rsplit("-", 1)[0], 0.0))
    alone = [(path.stem, [path]) for path in paths]
    grown = [(" + ".join(path.stem for path in paths[:k]), paths[:k]) for k in range(2, len(paths) + 1)]
    return alone + grown


def measured(given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """(a row of numbers for each, images of each)."""
    import stepdistill
    from evaluation.measure import measure
    from evaluation.metrics.latency import latencies
    from stepdistill import scenes

    samplers = [("teacher", stepdistill.load(given.teacher))]
    samplers += [
        (name, stepdistill.load(given.teacher, intervals=paths)) for name, paths in subsets(given.intervals)
    ]
    samplers += [(path.parent.name, stepdistill.load(path)) for path in given.further]
    if not samplers[0][1].conditions == "prompt":
        raise UserError(f"{given.teacher}: the scenes are drawn by prompts, and this teacher is told none.")
    drawers = []
    for _, sampler in samplers:
        many = {"steps": given.steps, "guidance": given.guidance} if sampler.steps is None else {}
        drawers.append(sampler.at(**many))
    times = latencies(
        drawers, [scenes.scene_at(0, 1_000_003).caption], images=given.timed, batch=0, teacher=0
    )
    captions = [scenes.scene_at(i, 1_000_003).caption for i in range(SHOWN)]
    rows, images = [], []
    for (name, sampler), drawer, timed in zip(samplers, drawers, times, strict=True):
        found = measure(drawer, "scenes-2k", ["fd", "attributes"], n=given.n).numbers
        found |= {value.name: value.value for value in timed if value.name.startswith("latency/")}
        rows.append(
            {"name": name, "steps": drawer.steps, "parameters": sampler.parameters["denoiser"]} | found
        )
        images.append((name, drawer(captions, range(SHOWN))))
        print(
            name,
            {key: round(value, 3) for key, value in found.items() if "fd" in key or "ms_per" in key},
            flush=True,
        )
    return rows, images


def save(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    teacher = rows[0]
    about = {
        "commit": git_commit(short=True),
        "teacher": str(given.teacher),
        "n": given.n,
        "guidance": given.guidance,
    }
    with atomic_write(given.out) as temporary:
        temporary.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    lines = [
        "| network | steps | parameters | FD / teacher's | attributes all | ms of one call / teacher's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        # A call of few steps has the encoder and the decoder to itself.
        alike = row["steps"] == teacher["steps"]
        slower = f"{row['latency/ms_per_call'] / teacher['latency/ms_per_call']:.2f}" if alike else ""
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['parameters'] / teacher['parameters']:.0%}"
            f" | {row['fd:scenes-v1'] / teacher['fd:scenes-v1']:.2f} | {100 * row['attributes/all']:.1f} %"
            f" | {slower} |"
        )
    with atomic_write(given.out.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def draw(images: list[tuple[str, Any]], path: Path) -> None:
    """One row per network, one column per prompt."""
    import numpy as np
    from PIL import Image, ImageDraw

    rows = [(name, np.concatenate(list(each.permute(0, 2, 3, 1).numpy()), 1)) for name, each in images]
    height, width = rows[0][1].shape[:2]
    margin = 8 + 6 * max(len(line) for name, _ in rows for line in name.split(" + "))
    canvas = Image.new("RGB", (margin + width, (height + 2) * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (name, picture) in enumerate(rows):
        top = (height + 2) * number
        pen.text((4, top + 4), name.replace(" + ", "\n"), fill="black")
        canvas.paste(Image.fromarray(picture), (margin, top + 1))
    with atomic_write(path) as temporary:
        canvas.save(temporary, format="PNG")


if __name__ == "__main__":
    main()
