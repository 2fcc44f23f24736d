"""What four full-size models take on 1, 8, 64 and 512 GPUs by three methods, from their configurations: no weights, no GPU.

    python -m benchmarks.scaling [LAYOUT ...]       (some CPU minutes for each row)

Every GPU has as many samples in a pass whatever their number, so the global batch grows with it. Results:
benchmarks/scaling.json, and the table in docs/scaling.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stepdistill.errors import atomic_write, quieten_libraries
from stepdistill.provenance import git_commit
from training.forecast import Forecast, forecast
from training.hardware import GPUS
from training.layouts import PaperSource, on_paper
from training.plan import RESERVE, ways, with_adapters
from training.recipe import Recipe, recipe_from

TABLE = Path(__file__).with_suffix(".json")
GPU = "h100-80g"
COUNTS = (1, 8, 64, 512)
# Samples of a GPU in one pass.
MICRO = 1
MODELS = {
    "sana-1.6b": {"name": "sana", "max_tokens": 300},
    "sdxl": {"name": "sdxl"},
    "sd3.5-large": {"name": "sd3", "max_tokens": 256},
    "flux.1-dev": {"name": "flux", "max_tokens": 512},
}
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2", "guidance_scale": 4.0},
    "scm": {"name": "scm", "guidance_scale": 4.0, "derivative": "difference"},
    "ladd": {"name": "ladd"},
}
STEPS = 10_000
# Tried as LoRAs too; a forecast takes minutes.
ADAPTED = ("dmd2",)


def stage(layout: str, method: str, count: int) -> Recipe:
    family = {**MODELS[layout], "teacher": layout, "resolution": [1024], "dtype": "bfloat16"}
    if layout == "flux.1-dev":
        # One pass: guidance is an input.
        scale = {"guidance_scale": 1.0} if method != "ladd" else {}
    else:
        scale = {}
    return recipe_from(
        {
            "family": family, "method": {**METHODS[method], **scale},
            "student": {"steps": [4], "ema": 0.0, "gradient_checkpointing": True},
            "data": {"name": "prompts", "path": "prompts.txt"},
            "optim": {"batch_size": count * MICRO, "micro_batch_size": MICRO},
            "run": {"steps": STEPS, "out": "runs/plan", "precision": "bf16"},
        }
    ).stages()[0]  # fmt: skip


def rows(layout: str, method: str) -> dict[str, Any]:
    """By number of GPUs, every way. A pass is counted once: it is the same on any number."""
    known: dict[str, Forecast] = {}
    one = stage(layout, method, 1)
    recipes = {"": one} | ({"LoRA": with_adapters(one)} if method in ADAPTED else {})
    for suffix, recipe in recipes.items():
        known[suffix] = forecast(recipe, on_paper(layout, recipe), PaperSource())
    found = {}
    for count in COUNTS:
        recipe = stage(layout, method, count)
        each = ways(recipe, known, count, GPUS[GPU])
        found[str(count)] = {
            way.name: {
                "gb": round((way.memory + RESERVE) / 1e9, 1),
                "fits": way.fits(GPUS[GPU]),
                "gb_sent": round(way.sent / 1e9, 1),
                "samples_per_second": float(f"{way.samples / way.seconds:.3g}"),
                "gpu_hours": round(STEPS * way.seconds * count / 3600),
            }
            for way in each
        }
    return found


def main() -> None:
    quieten_libraries()
    kept = json.loads(TABLE.read_text())["rows"] if TABLE.is_file() else {}
    for layout in sys.argv[1:] or MODELS:
        for method in METHODS:
            kept[f"{layout}, {method}"] = rows(layout, method)
            print(layout, method, json.dumps(kept[f"{layout}, {method}"]), flush=True)
            facts = {"commit": git_commit(short=True), "gpu": GPU, "iterations": STEPS, "micro_batch": MICRO}
            with atomic_write(TABLE) as path:
                path.write_text(json.dumps(facts | {"rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
