"""Every method on the embedded teacher: FD ratio, attributes, CLIP score, CPU minutes, peak memory.

    python -m benchmarks.embedded                               two methods per family, then all other recipes
                                                                training/recipes/scenes_*.yaml, for hours
    python -m benchmarks.embedded dmd2 sim run.steps=600        some, with values of their recipes replaced
    python -m benchmarks.embedded --report                      measure and tabulate what has been trained so far

Training goes on where it was when the same command is given again, and so does measuring. Runs lie under
runs/embedded/<method>; results: benchmarks/embedded.json, .md and .png (all methods, same prompts and seeds).
Teacher: 50 DDIM steps at the guidance with the least distance; same N, reference and seeds for all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
RUNS = ROOT / "runs" / "embedded"
TABLE = Path(__file__).with_suffix(".json")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
KEPT = [
    name + error
    for name in ("fd:scenes-v1", "fd_ratio", "attributes/all", "clip:scenes-v1")
    for error in ("", "/se")
]
# scenes_* recipes that make no student.
TEACHERS = ("teacher",)
# Two of each family.
FIRST = ("cd", "lcm", "sim", "sid", "dmd2", "diff_instruct", "ladd", "add")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="names after scenes_ (default: all), and section.key=value for their recipes"
    )
    parser.add_argument("--n", type=int, default=1000, help="samples measured (default: 1000)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    every = sorted(path.stem.removeprefix("scenes_") for path in RECIPES.glob("scenes_*.yaml"))
    overrides = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word]
    names = names or [*FIRST, *(name for name in every if name not in (*TEACHERS, *FIRST))]
    for name in names:
        if not (RECIPES / f"scenes_{name}.yaml").is_file():
            parser.error(f"there is no recipe scenes_{name}.yaml; there are {', '.join(every)}")
        if not args.report:
            train(name, overrides)
    done = sorted(path.parents[1].name for path in RUNS.glob("*/student/stepdistill.json"))
    if done:
        tabulate(done, args.n)


def train(name: str, overrides: list[str]) -> None:
    """Run or continue one recipe, and add up what it cost. One of a part of the data is run for all parts, merged."""
    out, recipe = RUNS / name, RECIPES / f"scenes_{name}.yaml"
    part = (yaml.safe_load(recipe.read_text()).get("data") or {}).get("partition")
    count = int(part.split("/")[1]) if part else 1
    runs = [out] if count == 1 else [out / f"part_{k + 1}" for k in range(count)]
    for k, run in enumerate(runs):
        words = [f"run.out={run}", "run.preview_every=0", *overrides]
        words += [f"data.partition={k + 1}/{count}"] * (count > 1)
        status = spend(out, ["training.train", str(recipe), *words], overrides)
        if status == 130:
            raise SystemExit(130)
    if count > 1 and status == 0:
        students = [str(run / "student") for run in runs]
        status = spend(out, ["training.merge", str(out / "student"), *students], overrides)
    print(f"{name}: {'done' if status == 0 else f'failed with {status}'}", flush=True)


def spend(out: Path, module: list[str], overrides: list[str]) -> int:
    """Run a module and add its CPU time and peak memory to `out`/cost.json; its exit status."""
    command = [sys.executable, "-m", *module]
    _, ended, used = os.wait4(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT).pid, 0)
    cost = {"cpu_seconds": 0.0, "peak_mib": 0.0} | (read(out / "cost.json") or {}) | {"overrides": overrides}
    cost["cpu_seconds"] += used.ru_utime + used.ru_stime
    cost["peak_mib"] = max(cost["peak_mib"], used.ru_maxrss / 1024)
    if out.is_dir():
        (out / "cost.json").write_text(json.dumps(cost) + "\n")
    return os.waitstatus_to_exitcode(ended)


def tabulate(names: list[str], n: int) -> None:
    """Measure all trained students beside the teacher in one evaluation, and draw them."""
    students = [str(RUNS / name / "student") for name in names]
    results = RUNS / "results"
    command = [
        sys.executable,
        "-m",
        "evaluation",
        "run",
        "--pipeline",
        *students,
        "--teacher",
        "assets/teacher",
    ]
    command += [
        "--teacher-guidance",
        "3",
        "--metrics",
        "fd,clip,attributes",
        "--n",
        str(n),
        "--out",
        str(results),
    ]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)
    found = read(results / "results.json")
    rows: dict[str, Any] = {}
    for row in found["rows"]:
        if row["role"] != "student":
            continue
        name = Path(row["path"]).parent.name
        kept = {key: row["metrics"][key] for key in KEPT if key in row["metrics"]}
        rows.setdefault(name, {"steps": {}})["steps"][str(row["steps"])] = kept
    for name, row in rows.items():
        recipe = RECIPES / f"scenes_{name}.yaml"
        row |= {"recipe": str(recipe.relative_to(ROOT)), "iterations": last_step(RUNS / name)}
        row |= read(RUNS / name / "cost.json") or {}
    teacher = next(row["metrics"] for row in found["rows"] if row["role"] == "teacher")
    about = {key: found[key] for key in ("protocol", "n", "machine", "git_commit", "date") if key in found}
    save({"teacher": teacher, "students": rows, "about": about})
    draw(students)


def draw(students: list[str]) -> None:
    """One column per prompt, one row per model."""
    import numpy as np
    from PIL import Image, ImageDraw

    import stepdistill
    from stepdistill import scenes
    from stepdistill.errors import atomic_write

    captions = [scenes.scene_at(i, 1_000_003).caption for i in range(12)]
    rows = []
    for path in ["assets/teacher", *students]:
        sampler = stepdistill.load(ROOT / path)
        images = sampler(captions, range(12), chunk=12).permute(0, 2, 3, 1).numpy()
        name = "teacher" if path.startswith("assets") else Path(path).parent.name
        label = f"{name}, {sampler.default_steps} step{'s' * (sampler.default_steps > 1)}"
        rows.append((label, np.concatenate(list(images), 1)))
    canvas = Image.new("RGB", (120 + rows[0][1].shape[1], 66 * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (label, picture) in enumerate(rows):
        pen.text((4, 66 * number + 26), label, fill="black")
        canvas.paste(Image.fromarray(picture), (120, 66 * number + 1))
    with atomic_write(TABLE.with_suffix(".png")) as temporary:
        canvas.save(temporary, format="PNG")


def last_step(run: Path) -> int:
    """The last checkpoint's step; of the parts of a partition, their sum."""
    parts = sorted(run.glob("part_*"))
    if parts:
        return sum(map(last_step, parts))
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=0)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def save(table: dict[str, Any]) -> None:
    from stepdistill.errors import atomic_write

    with atomic_write(TABLE) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")
    lines = [
        "| method | steps | FD / teacher's | attributes all | CLIP score | CPU minutes | peak MiB | iterations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(table["students"].items()):
        for steps, metrics in row["steps"].items():
            ratio = metrics.get("fd_ratio")
            peak = f"{row['peak_mib']:,.0f}" if row.get("peak_mib") else ""
            shown = f"{ratio:.2f} ± {metrics['fd_ratio/se']:.2f}" if ratio else ""
            lines.append(
                f"| {name} | {steps} | {shown} | {100 * metrics['attributes/all']:.1f} %"
                f" | {metrics['clip:scenes-v1']:.2f} | {row.get('cpu_seconds', 0) / 60:.1f}"
                f" | {peak} | {row['iterations']:,} |"
            )
    changed = {name: row["overrides"] for name, row in table["students"].items() if row.get("overrides")}
    if changed:
        lines += ["", "Recipes are training/recipes/scenes_*.yaml, but for:", ""]
        lines += [f"- {name}: `{' '.join(words)}`" for name, words in sorted(changed.items())]
    with atomic_write(TABLE.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
