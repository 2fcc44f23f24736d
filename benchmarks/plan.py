"""The memory that `training.plan` says of two processes beside what each of them then takes, in copies and in shards.

    python -m benchmarks.plan [NAME ...]      cases that are not named stay as they were

The cases, and how memory is measured, are those of benchmarks/memory.py; two processes talk by gloo on the CPU, and the
larger of both is kept. Time: benchmarks/plan_time.py. Results: benchmarks/plan.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory import CASES, GIVE_BACK, pipeline, raised_by, recipe, warmed_up
from stepdistill.errors import atomic_write
from stepdistill.provenance import git_commit

TABLE = Path(__file__).with_suffix(".json")
ROOT = TABLE.parents[1]
KINDS = {"DDP": {}, "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}


def child(name: str, folder: Path, kind: str) -> None:
    """In each of two processes: plan, run, and write both as JSON."""
    from accelerate import Accelerator

    from stepdistill.errors import quieten_libraries
    from training.forecast import forecast
    from training.plan import Shares, memory
    from training.recipe import recipe_from
    from training.run import build

    quieten_libraries()
    # It would end what processes talk by, and the second run has nothing.
    Accelerator.end_training = lambda self: None
    warmed_up(CASES[name], folder)
    wanted = recipe_from(recipe(CASES[name], folder))
    family, sources = build(wanted)
    said = forecast(wanted, family, sources[0], 2)
    del family, sources
    planned = max(memory(said, Shares.of(2, kind == "FSDP2")).values())
    told = {"planned": planned, "measured": raised_by(wanted), "unknown": said.unknown}
    (folder / f"told.{os.environ['RANK']}").write_text(json.dumps(told))


def measured(name: str, folder: Path, kind: str) -> dict[str, Any]:
    launch = [
        "accelerate.commands.launch", "--config_file", str(ROOT / "training/accelerate/2cpu.yaml"),
        "-m", "benchmarks.plan", name, str(folder), kind,
    ]  # fmt: skip
    place = {"cwd": folder, "env": {**os.environ, **GIVE_BACK, **KINDS[kind], "PYTHONPATH": str(ROOT)}}
    subprocess.run([sys.executable, "-m", *launch], check=True, **place)
    told = [json.loads((folder / f"told.{rank}").read_text()) for rank in (0, 1)]
    subprocess.run(["rm", "-rf", str(folder / "run"), str(folder / "warm")], check=True)
    mib = {key: round(max(each[key] for each in told) / 2**20, 1) for key in ("planned", "measured")}
    return mib | {"ratio": round(mib["planned"] / mib["measured"], 3)}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for shape in ("sdxl", "flux"):
            pipeline(shape, folder / shape)
        for name in names or CASES:
            for kind in KINDS:
                row = measured(name, folder, kind) | {"commit": git_commit(short=True)}
                print(kind, name, row, flush=True)
                kept = json.loads(TABLE.read_text())["cases"] if TABLE.is_file() else {}
                with atomic_write(TABLE) as path:
                    cases = kept | {f"{kind}: {name}": row}
                    path.write_text(json.dumps({"unit": "MiB", "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    if "RANK" in os.environ:
        child(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1:])
