"""Students of the embedded teacher, trained, measured, tabulated and drawn for the benchmarks; each command is a process of its
own, whose CPU time and memory are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepdistill.errors import Interrupted, UserError, atomic_write
from stepdistill.methods import EVERY_METHOD
from stepdistill.registry import resolve
from training.interrupts import deferred

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
TEACHER = "assets/teacher"
# What recipes of an embedded teacher begin with.
PREFIXES = {TEACHER: "scenes_", "assets/transformer": "transformer_"}
# By glibc's defaults the memory of every large tensor goes back to the system and is asked for again, page by page. Kept, and in
# large pages, a training step takes up to a fifth less CPU time (benchmarks/allocator.json). A process holds somewhat more for it.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC),
    # Some commands start in a folder of their own.
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}
# Of a row of an evaluation's results.
KEPT = [
    name + error
    for name in ("fd:scenes-v1", "fd_ratio", "attributes/all", "clip:scenes-v1")
    for error in ("", "/se")
]
DIVERSITY = "diversity:scenes-v1/of_teacher"
SEEDS = ["diversity:scenes-v1", "diversity:scenes-v1/se", DIVERSITY, DIVERSITY + "/se"]


def recipe_of(name: str, teacher: str = TEACHER) -> Path:
    """scenes_<name>.yaml, or what an embedded teacher's recipes begin with."""
    return RECIPES / f"{PREFIXES[teacher]}{name}.yaml"


def mapping_of(name: str, teacher: str = TEACHER) -> dict[str, Any]:
    """Such a recipe as it is written."""
    return yaml.safe_load(recipe_of(name, teacher).read_text())


def distillations(teacher: str = TEACHER) -> list[str]:
    """Names of the recipes that make few-step students of an embedded teacher."""
    found = []
    for path in sorted(RECIPES.glob(f"{PREFIXES[teacher]}*.yaml")):
        name = path.stem.removeprefix(PREFIXES[teacher])
        mapping = mapping_of(name, teacher)
        method = (mapping.get("method") or {}).get("name")
        leaves_teacher = method is not None and resolve(method, EVERY_METHOD, "method").leaves_teacher
        if mapping["family"].get("teacher") == teacher and not leaves_teacher:
            found.append(name)
    return found


def train(recipe: Path, out: Path, overrides: Sequence[str] = (), *, account: Path, cwd: Path = ROOT) -> int:
    """Run or continue a recipe in `out`; one of a part of the data is run for all parts, merged. Its exit status."""
    part = (yaml.safe_load(recipe.read_text()).get("data") or {}).get("partition")
    count = int(part.split("/")[1]) if part else 1
    runs = [out] if count == 1 else [out / f"part_{k + 1}" for k in range(count)]
    for k, run in enumerate(runs):
        words = [f"run.out={run}", "run.preview_every=0", *overrides]
        words += [f"data.partition={k + 1}/{count}"] * (count > 1)
        if status := spend("training.train", [recipe, *words], account=account, cwd=cwd):
            return status
    if count == 1:
        return 0
    merged = [out / "student", *(run / "student" for run in runs)]
    return spend("training.merge", merged, account=account, cwd=cwd)


def spend(
    module: str,
    words: Iterable[Any],
    *,
    account: Path | None = None,
    cwd: Path = ROOT,
    compared: bool = False,
) -> int:
    """Run a module, with an account of it (`metered`) in the folder `account`; its exit status.

    Raises Interrupted where a signal asks for an end, which the module is told once and has obeyed by then.
    """
    metered = [] if account is None else ["benchmarks.metered", *["--compared"] * compared, str(account)]
    command = [sys.executable, "-m", *metered, module, *map(str, words)]
    with deferred() as asked:
        # The signals of a terminal come to this process alone.
        child = subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, start_new_session=True)
        told = False
        while child.poll() is None:
            if asked.ending and not told:
                child.send_signal(asked.ending)
                told = True
            time.sleep(0.1)
    if asked.ending:
        raise Interrupted(asked.ending)
    return child.returncode


def measure(
    students: Sequence[Path],
    out: Path,
    n: int,
    metrics: str,
    words: Sequence[str] = (),
    teacher: str = TEACHER,
) -> dict[str, Any]:
    """What one evaluation of students beside the teacher, whose best guidance is 3, says of them."""
    given = ["run", "--pipeline", *students, "--teacher", teacher, "--teacher-guidance", 3]
    if status := spend("evaluation", [*given, "--metrics", metrics, "--n", n, "--out", out, *words]):
        raise UserError(f"the evaluation of {', '.join(map(str, students))} ended with {status}; see above.")
    return read(out / "results.json")


def rows_of(results: Mapping[str, Any], role: str = "student") -> dict[str, dict[str, dict[str, float]]]:
    """The numbers of a results file by the pipeline's path and its number of steps."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in results["rows"]:
        if row["role"] == role:
            found.setdefault(row["path"], {})[str(row["steps"])] = row["metrics"]
    return found


def markdown(students: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A table of rows with steps, cpu_seconds, peak_mib and iterations; of the seeds' diversity where one was measured."""
    students = list(students)
    diverse = any(DIVERSITY in metrics for _, row in students for metrics in row["steps"].values())
    heads = ["method", "steps", "FD / teacher's", "attributes all", "CLIP score", "CPU minutes", "peak MiB"]
    heads += ["iterations"] + ["diversity / teacher's"] * diverse
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in students:
        for steps, metrics in row["steps"].items():
            peak = f"{row['peak_mib']:,.0f}" if row.get("peak_mib") else ""
            cells = [name, steps, _shown(metrics, "fd_ratio"), f"{100 * metrics['attributes/all']:.1f} %"]
            cells += [f"{metrics['clip:scenes-v1']:.2f}", f"{row.get('cpu_seconds', 0) / 60:.1f}", peak]
            cells += [f"{row['iterations']:,}"] + [_shown(metrics, DIVERSITY)] * diverse
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(name)
    return f"{value:.2f} ± {metrics[name + '/se']:.2f}" if value else ""


def draw(rows: Iterable[tuple[str, Path, int | None]], path: Path) -> None:
    """A picture of labels, pipelines and steps (None: their own): one column per prompt, one row each."""
    import numpy as np
    from PIL import Image, ImageDraw

    import stepdistill
    from stepdistill import scenes

    captions = [scenes.scene_at(i, scenes.HELD_OUT_SEED).caption for i in range(12)]
    drawn = []
    for name, place, steps in rows:
        sampler = stepdistill.load(place)
        count = steps or sampler.default_steps
        images = sampler(captions, range(12), steps=count, chunk=12).permute(0, 2, 3, 1).numpy()
        drawn.append((f"{name}, {count} step{'s' * (count > 1)}", np.concatenate(list(images), 1)))
    canvas = Image.new("RGB", (120 + drawn[0][1].shape[1], 66 * len(drawn)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (label, picture) in enumerate(drawn):
        pen.text((4, 66 * number + 26), label, fill="black")
        canvas.paste(Image.fromarray(picture), (120, 66 * number + 1))
    with atomic_write(path) as temporary:
        canvas.save(temporary, format="PNG")


def last_step(run: Path) -> int:
    """The last checkpoint's step; of the parts of a partition, their sum."""
    if parts := sorted(run.glob("part_*")):
        return sum(map(last_step, parts))
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=0)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def write(path: Path, content: Any) -> None:
    """Text as it is, anything else as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
