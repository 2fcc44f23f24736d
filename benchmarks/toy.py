"""Every method on the exact 8-mode mixture: sliced W1 over the sampling floor, modes covered, CPU seconds.

    python -m benchmarks.toy                          all recipes training/recipes/toy_*.yaml, one after another
    python -m benchmarks.toy sim dmd2 --schedule flow the same under another teacher schedule

A row that exists for the same recipe and code is not run again, so a stopped command goes on. Results:
benchmarks/toy.json and benchmarks/toy.md. 4,096 samples, 512 projections, seed 0, one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
TABLE = Path(__file__).with_suffix(".json")
SCHEDULES = ("vp", "edm", "flow", "trig")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help="names after toy_ (default: all)")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of the teacher (default: the recipe's)")
    parser.add_argument("--force", action="store_true", help="run rows again that are there")
    args = parser.parse_args()
    names = args.methods or sorted(path.stem.removeprefix("toy_") for path in RECIPES.glob("toy_*.yaml"))
    for name in names:
        recipe = RECIPES / f"toy_{name}.yaml"
        if not recipe.is_file():
            parser.error(f"there is no {recipe}")
        key = name if args.schedule is None else f"{name}/{args.schedule}"
        identity = fingerprint(recipe)
        if not args.force and table().get(key, {}).get("identity") == identity:
            print(f"{key}: there already")
            continue
        row = run(recipe, args.schedule) | {"identity": identity}
        save(table() | {key: row})
        print(key, json.dumps(row), flush=True)


def run(recipe: Path, schedule: str | None) -> dict:
    """Train, and read back what the run says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "training.train", str(recipe), f"run.out={folder}/run"]
        command += ["run.preview_every=0", "run.threads=1"]
        command += [f"family.schedule={schedule}"] if schedule else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1]}
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    return {
        "sw1": {label(key): value for key, value in found.items() if key.startswith("metric/sw1")},
        "modes": {label(key): value for key, value in found.items() if key.startswith("metric/modes")},
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "steps": found["step"],
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }


def label(key: str) -> str:
    """ "metric/sw1@4" -> "4"; the least number of steps has no label of its own."""
    return key.partition("@")[2] or "least"


def fingerprint(recipe: Path) -> str:
    """Names the recipe and the library it runs on."""
    digest = hashlib.sha256(recipe.read_bytes())
    for source in sorted((ROOT / "stepdistill").rglob("*.py")):
        if source.parent.name != "attention":
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


def save(rows: dict) -> None:
    from stepdistill.errors import atomic_write

    with atomic_write(TABLE) as temporary:
        temporary.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    lines = [
        "| method | sliced W1 / floor | modes of 8 | CPU seconds | iterations |",
        "|---|---|---|---|---|",
    ]
    for key, row in sorted(rows.items(), key=lambda item: item[1].get("sw1", {}).get("least", 1e9)):
        if "error" in row:
            lines.append(f"| {key} | {row['error']} | | | |")
            continue
        scores = ", ".join(
            f"{value:.2f}" + ("" if steps == "least" else f" ({steps} steps)")
            for steps, value in row["sw1"].items()
        )
        modes = ", ".join(f"{value:.0f}" for value in row["modes"].values())
        lines.append(f"| {key} | {scores} | {modes} | {row['cpu_seconds']:.0f} | {row['steps']:,} |")
    with atomic_write(TABLE.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
