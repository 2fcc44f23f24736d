"""Every method on the exact 8-mode mixture: sliced W1 over the sampling floor, modes, CPU seconds.

    python -m benchmarks.toy                          all recipes training/recipes/toy_*.yaml, one after another
    python -m benchmarks.toy sim dmd2 --schedule flow the same under another teacher schedule
    python -m benchmarks.toy cd dmd2 --guidance 2     two classes of 4 modes each, guided by that scale
    python -m benchmarks.toy cd --set method.link_weight=uniform     a trial: the recipe with a setting changed

Samples of 4,096 points, 512 projections, fixed seeds, one thread; the distance is the mean of 4 samples of the student to
10 of exact points, the floor that of the 10 to each other. "Shares off" is the total variation of the modes' shares from
their weights (exact samples: 0.016), "variance off" the mean of |variance / true variance - 1| over modes (exact: 0.03),
both at the fewest steps. CPU seconds are those of the whole command: importing, fitting
the network that starts as the exact teacher (1,000 iterations), training, measuring.

A row that exists for the same recipe and the same code of its methods is not run again, so a stopped command goes on.
What else it ran on (schedules, losses, the trainer) is not compared: each row names its commit, and --force runs it
again. Results: benchmarks/toy.json and benchmarks/toy.md.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from stepdistill.denoiser import guided
from stepdistill.errors import atomic_write, cli_errors
from stepdistill.families.toy import SCHEDULES, Toy
from stepdistill.methods.base import Method
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.provenance import git_commit
from stepdistill.registry import allowing_code
from stepdistill.schedule import times_like
from stepdistill.solvers import heun
from stepdistill.timesteps import as_edm
from training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
TABLE = Path(__file__).with_suffix(".json")


class MeasuredToy(Toy):
    """The mixture, and what a guided teacher makes of it as the truth."""

    @dataclass
    class Config(Toy.Config):
        # g of uncond + g (cond - uncond); what a student should draw is guided by it.
        guidance_scale: float = 1.0

    def exact(self, count: int, seed: int) -> Tensor:
        """`count` points of what a student should draw, classes in turn, (count, 2): of the data, or under guidance
        the ends of the guided teacher's ODE."""
        if self.config.guidance_scale == 1:
            return super().exact(count, seed)
        cond = self.encode([i % self.config.classes for i in range(count)])
        return self.guided_ends(SampleNoise(range(count), seed=seed, phase="reference"), cond)

    @torch.no_grad()
    def guided_ends(self, noise: SampleNoise, cond: Tensor, steps: int = 50) -> Tensor:
        """By Heun's method in EDM's terms."""
        frame, uncond = as_edm(self.schedule), self.uncond(len(cond))
        grid = frame.ode_grid(steps, "karras").tolist()
        asked = partial(self.teacher, in_schedule=frame)

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return guided(asked, x, t, cond, uncond, self.config.guidance_scale)

        x = frame.pure_noise(noise.randn(2, dtype=torch.float64), grid[0])
        for t, s in itertools.pairwise(grid):
            x = heun(predict, x, times_like(t, x), times_like(s, x))
        return predict(x, times_like(grid[-1], x)).x0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help="names after toy_ (default: all)")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of the teacher (default: the recipe's)")
    parser.add_argument("--guidance", type=float, help="two classes, and the teacher guided by this scale")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the recipe",
    )
    parser.add_argument("--force", action="store_true", help="run rows again that are there")
    args = parser.parse_args()
    names = args.methods or sorted(path.stem.removeprefix("toy_") for path in RECIPES.glob("toy_*.yaml"))
    for name in names:
        path = RECIPES / f"toy_{name}.yaml"
        if not path.is_file():
            parser.error(f"there is no {path}")
        key, overrides = name, ["family.name=benchmarks.toy:MeasuredToy"]
        if args.schedule:
            key = f"{key}/{args.schedule}"
            overrides += [f"family.schedule={args.schedule}"]
        if args.guidance:
            key = f"{key}/guided"
            overrides += [f"{part}.guidance_scale={args.guidance:g}" for part in ("family", "method")]
            overrides += ["family.classes=2"]
        if args.settings:
            key = "?".join((key, *args.settings))
            overrides += args.settings
        # The family that measures more is this file's own; a recipe's stages are built when they are asked for.
        with cli_errors(), allowing_code():
            recipe = load_recipe(path, overrides)
            identity = fingerprint(path, overrides, recipe)
            if not args.force and table().get(key, {}).get("identity") == identity:
                print(f"{key}: there already")
                continue
            row = about(recipe, args.guidance) | run(path, overrides, recipe) | {"identity": identity}
            row |= {"settings": args.settings} if args.settings else {}
        save(table() | {key: row})
        print(key, json.dumps(row), flush=True)


def about(recipe: Recipe, guidance: float | None) -> dict[str, Any]:
    return {
        "schedule": recipe.family.config.schedule,
        "guidance": guidance or 1.0,
        "seed": recipe.run.seed,
        "commit": git_commit(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread",
    }


def run(path: Path, overrides: list[str], recipe: Recipe) -> dict[str, Any]:
    """Train, and read back what the run says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "training.train", str(path), *overrides, f"run.out={folder}/run"]
        command += ["run.preview_every=0", "run.threads=1", "--allow-code"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1]}
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    least = min(list(recipe.stages())[-1].student.steps)

    def by_steps(metric: str) -> dict[str, float]:
        """ "metric/sw1@4" counts for 4 steps; the least number of steps has no label of its own."""
        kept = {k.partition("@")[2] or str(least): v for k, v in found.items() if k.startswith(metric)}
        return dict(sorted(kept.items(), key=lambda item: int(item[0])))

    rounded = {
        name: {steps: round(value, 3) for steps, value in by_steps(f"metric/{name}").items()}
        for name in ("sw1", "shares", "trace", "shape")
    }
    return rounded | {
        "modes": {steps: int(value) for steps, value in by_steps("metric/modes").items()},
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "iterations": found["step"],
    }


def fingerprint(path: Path, overrides: list[str], recipe: Recipe) -> str:
    """Names what the recipe says and the code of its methods, comments and docstrings aside."""
    said = yaml.safe_load(path.read_text())
    for silent in ("out", "log_every", "preview_every", "threads"):
        said["run"].pop(silent, None)
    digest = hashlib.sha256(json.dumps([said, overrides], sort_keys=True).encode())
    files = {file for stage in recipe.stages() for file in sources(stage.new_method())}
    for file in sorted(files):
        digest.update(bare(file).encode())
    return digest.hexdigest()[:16]


def sources(method: Method) -> Iterator[str]:
    """The files of a method's classes, the common base left out, and of the methods it is made of."""
    for cls in type(method).__mro__:
        if issubclass(cls, Method) and cls.__module__ != Method.__module__:
            yield inspect.getsourcefile(cls)
    parts = [part for _, _, part in getattr(method, "parts", ())]
    for part in [*parts, *([method.base] if isinstance(getattr(method, "base", None), Method) else [])]:
        yield from sources(part)


@lru_cache
def bare(file: str) -> str:
    """A file's code as the parser sees it, without docstrings."""
    tree = ast.parse(Path(file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


def save(rows: dict[str, Any]) -> None:
    with atomic_write(TABLE) as temporary:
        temporary.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    with atomic_write(TABLE.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(rows))


def markdown(rows: dict[str, Any]) -> str:
    """The recipes as they are shipped, under other schedules, with guidance, trials; last, rows of the toy as it was before."""
    titles = (
        "Sliced W1 over the sampling floor, as shipped",
        "The same recipes under other teacher schedules",
        "Two classes of 4 modes each, guided; the reference is the end of the guided teacher's ODE",
        "Trials: recipes with a setting changed",
        "Not comparable with the above: modes of equal shares about the origin, by the code of each row's commit",
    )
    groups: list[list[tuple[str, dict[str, Any]]]] = [[] for _ in titles]
    for key, row in sorted(rows.items()):
        earlier = "sw1" in row and "shares" not in row
        place = (
            4
            if earlier
            else 3
            if "settings" in row
            else 2
            if row["guidance"] != 1
            else 1
            if "/" in key
            else 0
        )
        groups[place].append((key, row))
    for group in (groups[0], groups[-1]):
        group.sort(key=lambda item: _least(item[1]))
    parts = []
    for title, group in zip(titles, groups, strict=True):
        lines = [
            f"**{title}**",
            "",
            "| method | schedule | 1 step | 2 steps | 4 steps | 8 steps | modes of 8 | shares off | variance off | CPU s |"
            " iterations |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key, row in group:
            name = key if group is groups[-1] else re.split("[/?]", key)[0]
            name += "".join(f", `{setting}`" for setting in row.get("settings", ()))
            if "error" in row:
                lines.append(f"| {name} | {row['schedule']} | {row['error']} | | | | | | | | |")
                continue
            scores = " | ".join(f"{row['sw1'][n]:.2f}" if n in row["sw1"] else "" for n in "1248")
            modes = ", ".join(str(value) for value in row["modes"].values())
            off = " | ".join(_first(row.get(measure)) for measure in ("shares", "trace"))
            # Not of a row whose run was made by hand.
            seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
            tail = f"{modes} | {off} | {seconds} | {row['iterations']:,} |"
            lines.append(f"| {name} | {row['schedule']} | {scores} | {tail}")
        parts.append("\n".join(lines) if group else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _first(values: dict[str, float] | None) -> str:
    """At the fewest steps."""
    return f"{next(iter(values.values())):.2f}" if values else ""


def _least(row: dict[str, Any]) -> float:
    return next(iter(row.get("sw1", {}).values()), 1e9)


if __name__ == "__main__":
    main()
