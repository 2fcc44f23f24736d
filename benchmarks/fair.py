"""Every method on the embedded teacher at one budget: CPU minutes of one thread, from a command's start to its student.

    python -m benchmarks.fair                                   all methods at 30 minutes each, one after another
    python -m benchmarks.fair --minutes 10 --only sida,imf      two of them at ten
    python -m benchmarks.fair --report                          tabulate what there is; train nothing

A method trains by its own recipe, training/recipes/scenes_*.yaml, from where that starts. A trial run of a few iterations of
every stage says what its start and an iteration cost. All stages are then made longer or shorter in proportion, and with them
what a recipe counts in iterations, so that schedules end where the budget does. After it the student is measured: 1,000
samples in 1, 2 and 4 steps, as far as it serves them, and eight seeds of 100 captions.

Given again, the command goes on with what is missing, from the last checkpoint, which is a minute old at most. Runs lie
under --runs/<minutes>/<method>; a second command there passes over what the first one is at. Results: benchmarks/fair.json,
.md and .png.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import students
from benchmarks.budget import budgeted, lengths, parts_of, resized, served
from benchmarks.fair_table import COLOURS, measured, own_judges, tabulate
from benchmarks.metered import PLAIN, account
from benchmarks.students import ROOT, read, write
from stepdistill.config import apply_overrides
from stepdistill.errors import UserError, cli_errors, nearest
from stepdistill.provenance import git_commit
from training.lock import Lock

TABLE = Path(__file__).with_suffix(".json")
# CPU seconds that a plain pass (`metered`) counts for. Those it takes depend on what else the machine does: 0.16 to 0.26 with
# twenty processes on two cores. What a budget buys must not, or methods that ran beside others would be the worse for it.
PLAIN_SECONDS = 0.1
# Iterations of each stage in a trial run.
TRIAL = 12
# The order in which methods are run; all others follow.
FIRST = (
    "sida", "imf", "dmf", "anyflow", "decoupled_dmd", "cdm", "twinflow", "phased_dmd", "rdm", "sim", "dmd2", "scm", "cd",
    "ect", "ladd", "add", "diff_instruct", "f_distill", "lcm", "kd",
)  # fmt: skip
# Rows of no recipe of their own: whose it is, and what they replace in it.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dmd2_diversity": (
        "dmd2",
        ("student.steps=[2,4]", *(f"stages.{k}.method.diversity_weight=0.05" for k in range(6))),
    ),
    # Links that count alike.
    "cd_uniform": ("cd", ("method.link_weight=uniform",)),
    "tscd_uniform": ("tscd", ("method.link_weight=uniform",)),
    # And a link's loss over the noise between its ends.
    "hyper_sd_gap": (
        "hyper_sd",
        (
            *(f"stages.{k}.method.link_weight=inverse_gap" for k in (0, 1)),
            *(f"stages.{k}.method.parts.0.link_weight=inverse_gap" for k in (2, 3, 4, 5)),
        ),
    ),
    "anyflow_told": ("anyflow", ("stages.1.method.tell_place=true",)),
    # Less of Diff-Instruct, at half its rate: in a long run of f_distill that rate lost the seeds' diversity.
    "sida_long": (
        "sida",
        (
            "stages.0.run.steps=150",
            "stages.0.optim.lr=5e-4",
            "stages.1.run.steps=500",
            "stages.1.optim.student.lr=2e-4",
        ),
    ),
    "dmd2_told": ("dmd2", tuple(f"stages.{k}.method.tell_place=true" for k in range(6))),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="CPU minutes of a method (default: 30)")
    parser.add_argument("--only", help="names after scenes_, with commas between (default: all)")
    parser.add_argument("--n", type=int, default=1000, help="samples measured (default: 1000)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fair", help="where runs lie")
    parser.add_argument("--table", type=Path, default=TABLE, help="the JSON file; .md and .png lie beside it")
    parser.add_argument("--report", action="store_true", help="train and measure nothing")
    args = parser.parse_args(arguments)
    with cli_errors():
        if not 0 < args.minutes < math.inf:
            raise UserError(f"--minutes must be above 0, got {args.minutes:g}.")
        if args.n < 16:
            raise UserError(f"--n must be at least 16, got {args.n}.")
        names, runs, failed = chosen(args.only), args.runs.resolve(), []
        for name in () if args.report else names:
            if found(read(args.table), name, args.minutes):
                continue
            folder = runs / f"{args.minutes:g}" / name
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder / "lock")
            if not lock.take():
                print(f"{name}: another process is at it", flush=True)
                continue
            try:
                finished = make(name, args.minutes, folder, args.n)
            finally:
                lock.release()
            failed += [] if finished else [name]
            tabulate(runs, args.table)
        tabulate(runs, args.table)
        if failed:
            raise UserError(f"no student of {', '.join(failed)}; what stopped them is above.")


def chosen(only: str | None) -> list[str]:
    """Names of rows, in the order they are run. Raises UserError for one that is none."""
    every = [*students.distillations(), *VARIANTS]
    names = [name for name in (only or "").split(",") if name] or [
        *FIRST,
        *(name for name in every if name not in FIRST),
    ]
    for name in names:
        if name not in every:
            raise UserError(f"--only: there is no method {name!r} here.{nearest(name, every)}")
    return names


def make(name: str, minutes: float, folder: Path, n: int) -> bool:
    """Train and measure one row, as far as that is not done; False where the training fails."""
    if (folder / "row.json").is_file():
        return True
    mapping = recipe_of(name)
    prepare(folder, folder.parents[1])
    plan = read(folder / "plan.json") or planned(mapping, minutes, folder)
    if plan is None:
        return False
    print(
        f"{name}: {sum(plan['iterations']):,} iterations in {plan['planned_minutes']:.1f} minutes", flush=True
    )
    run = folder / "run"
    if students.train(folder / "recipe.yaml", run, account=folder / "account", cwd=folder):
        return False
    cost = account(folder / "account")
    row = {
        "method": name,
        "minutes": minutes,
        "iterations": students.last_step(run),
        "planned_minutes": plan["planned_minutes"],
        "cpu_seconds": cost["cpu_seconds"],
        "peak_mib": cost["peak_mib"],
        "commit": plan["commit"],
    }
    steps = [count for count in served(mapping) if count in COLOURS]
    if own := own_judges(folder / "recipe.yaml"):
        row["own_judges"] = own
    write(folder / "row.json", row | measured(run / "student", steps, folder, n))
    return True


def recipe_of(name: str) -> dict[str, Any]:
    """The mapping of a row's recipe, with checkpoints by the clock alone."""
    recipe, overrides = VARIANTS.get(name, (name, ()))
    mapping = apply_overrides(students.mapping_of(recipe), overrides)
    mapping["run"] |= {"save_every": 0, "save_minutes": 1.0, "keep": 1, "precompute": "never"}
    return mapping


def prepare(folder: Path, runs: Path) -> None:
    """Make a place for a training to start in. The images' latents are the same for all, computed once and on no account;
    what else a run computes at its start, as a teacher's trajectories, is its own.
    """
    for place in (runs, folder):
        place.mkdir(parents=True, exist_ok=True)
        # Recipes name the embedded models from the repository's root.
        (place / "assets").unlink(missing_ok=True)
        (place / "assets").symlink_to(ROOT / "assets")
    ready = runs / "cache" / "ready"
    if not ready.is_file():
        if students.spend("training.precompute", [students.RECIPES / "scenes_ect.yaml"], cwd=runs):
            raise UserError(f"the latents of the images could not be computed in {ready.parent}; see above.")
        ready.touch()
    (folder / "cache").mkdir(exist_ok=True)
    for latents in ready.parent.glob("latents-*"):
        if not (folder / "cache" / latents.name).exists():
            (folder / "cache" / latents.name).symlink_to(latents)


def planned(mapping: Mapping[str, Any], minutes: float, folder: Path) -> dict[str, Any] | None:
    """Try the recipe, write the one that fits the budget, and say what it will take; None where it cannot run."""
    trial, counts = folder / "trial", lengths(mapping)
    shutil.rmtree(trial, ignore_errors=True)
    prepare(trial, folder.parents[1])
    write(trial / "recipe.yaml", yaml.safe_dump(resized(mapping, [TRIAL] * len(counts))))
    words = [trial / "recipe.yaml", f"run.out={trial / 'run'}", "run.preview_every=0"]
    if students.spend("training.train", words, account=trial / "account", cwd=trial, compared=True):
        return None
    cost = account(trial / "account")
    plain, *timed = [cost["stages"][key] for key in (PLAIN, *map(str, range(len(counts))))]
    slowed = plain[1] / plain[0] / PLAIN_SECONDS
    each = [seconds / count / slowed for count, seconds in timed]
    fixed = (cost["cpu_seconds"] - sum(seconds for _, seconds in (plain, *timed))) / slowed
    # One of a part of the data is run for each part.
    parts = parts_of(mapping)
    iterations = budgeted(60 * minutes / parts, fixed, each, counts)
    seconds = parts * (fixed + sum(cost * count for cost, count in zip(each, iterations, strict=True)))
    plan = {
        "iterations": iterations,
        "planned_minutes": seconds / 60,
        "fixed_seconds": fixed,
        "seconds_an_iteration": each,
        "slowed": slowed,
        "commit": git_commit(),
    }
    write(folder / "recipe.yaml", yaml.safe_dump(resized(mapping, iterations), sort_keys=False))
    write(folder / "plan.json", plan)
    shutil.rmtree(trial)
    return plan


def found(table: dict[str, Any] | None, name: str, minutes: float) -> bool:
    return any((row["method"], row["minutes"]) == (name, minutes) for row in (table or {"rows": []})["rows"])


if __name__ == "__main__":
    main()
