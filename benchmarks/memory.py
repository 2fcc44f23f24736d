"""The memory that `--dry-run` forecasts beside what a run then takes.

    python -m benchmarks.memory

Three teachers: the embedded one, one in SDXL's shape and one in FLUX's, the latter two with random weights and larger
than their training recipes' ones. What a run takes is how far it raises the resident memory of a process of its own
above what a short run of the same has left there, so that the libraries are not counted, from its first step on; glibc is told
to give back what is freed, and a thread looks every millisecond. Results: benchmarks/memory.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import atomic_write
from stepdistill.provenance import git_commit

if TYPE_CHECKING:
    from training.forecast import Forecast
    from training.recipe import Recipe

TABLE = Path(__file__).with_suffix(".json")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
SHARED: dict[str, Any] = {
    "data": {"name": "scenes", "size": 64},
    "run": {"steps": 3, "threads": 1, "trackers": [], "log_every": 1},
}
GAN = {"name": "dmd2", "student_every": 1, "guidance_scale": 2.0, "gan_weight": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "embedded teacher, dmd2 with a GAN, batch 32": {
        "family": {"name": "sd"}, "method": GAN, "optim": {"batch_size": 32},
    },
    "sdxl, lcm, batch 16 in two passes, bf16": {
        "family": {"name": "sdxl", "teacher": "sdxl"}, "method": {"name": "lcm"},
        "optim": {"batch_size": 16, "micro_batch_size": 8}, "run": {"precision": "bf16"},
    },
    "flux, dmd2 of adapters over one teacher, checkpointed, batch 16": {
        "family": {"name": "flux", "teacher": "flux", "resolution": [128], "max_tokens": 20},
        "method": {**GAN, "gan_weight": 0.0, "fake_score_lora": {"rank": 16}},
        "student": {"lora": {"rank": 16}, "gradient_checkpointing": True}, "optim": {"batch_size": 16}, "run": {"steps": 2},
    },
}  # fmt: skip


def pipeline(shape: str, path: Path) -> None:
    """A pipeline of some 40 M parameters in a model's shape."""
    import torch
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    from training.embedded.shapes import SHAPES

    torch.manual_seed(0)
    made = SHAPES[shape]()
    if shape == "sdxl":
        wider = {"block_out_channels": (128, 256), "attention_head_dim": 64}
        made.register_modules(unet=UNet2DConditionModel.from_config(dict(made.unet.config) | wider))
    else:
        larger = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 12}
        made.register_modules(
            transformer=FluxTransformer2DModel.from_config(dict(made.transformer.config) | larger)
        )
    made.save_pretrained(path)


def recipe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    merged = {name: {**SHARED.get(name, {}), **case.get(name, {})} for name in {*SHARED, *case}}
    if "teacher" in merged["family"]:
        merged["family"] = merged["family"] | {"teacher": str(folder / merged["family"]["teacher"])}
    merged["run"] = merged["run"] | {"out": str(folder / "run")}
    return merged


def resident() -> int:
    """Of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """The largest `resident` until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.running = 0, True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.001)

    def stop(self) -> int:
        self.running = False
        self.join()
        return self.peak


def child(name: str, folder: Path) -> None:
    """Forecast, run, and print both as JSON."""
    from stepdistill.errors import quieten_libraries
    from training.forecast import forecast
    from training.recipe import recipe_from
    from training.run import build

    quieten_libraries()
    warmed_up(CASES[name], folder)
    wanted = recipe_from(recipe(CASES[name], folder))
    family, sources = build(wanted)
    said = forecast(wanted, family, sources[0])
    del family, sources
    print(json.dumps(found_by(said, raised_by(wanted))))


def warmed_up(case: dict[str, Any], folder: Path) -> None:
    """A short run of the same recipe has been, so that libraries, and kernels compiled for these shapes, are in memory: of
    the embedded teacher they are 30 MiB.
    """
    from training.recipe import recipe_from

    said = recipe(case, folder)
    said["optim"] = said.get("optim", {}) | {"batch_size": 2, "micro_batch_size": 1}
    said["run"] = said["run"] | {"out": str(folder / "warm")}
    raised_by(recipe_from(said))


class Enough(Exception):
    """Ends a run."""


def raised_by(wanted: Recipe) -> int:
    """Bytes by which a run raises this process's memory, from its first step to its last: saving makes shards whole."""
    from training.run import run
    from training.trainer import Trainer

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, watch, fit, save = resident(), Watch(), Trainer.fit, Trainer.save

    def watched(trainer: Trainer) -> Any:
        # What reading the pipeline's files took is over.
        watch.start()
        return fit(trainer)

    def ended(trainer: Trainer) -> None:
        raise Enough

    Trainer.fit, Trainer.save = watched, ended
    try:
        with contextlib.suppress(Enough):
            run(wanted)
    finally:
        Trainer.fit, Trainer.save = fit, save
    return watch.stop() - before


def found_by(said: Forecast, measured: int) -> dict[str, Any]:
    return {"forecast": said.peak, "measured": measured, "phases": said.phases, "unknown": said.unknown}


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for shape in ("sdxl", "flux"):
            pipeline(shape, folder / shape)
        for name in CASES:
            place = {"cwd": folder, "env": {**os.environ, **GIVE_BACK, "PYTHONPATH": str(TABLE.parents[1])}}
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", name, str(folder)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                **place,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            mib = {key: round(found[key] / 2**20, 1) for key in ("forecast", "measured")}
            results[name] = mib | {"ratio": round(found["forecast"] / found["measured"], 3)}
            print(
                name,
                results[name],
                found["unknown"],
                {k: round(v / 2**20) for k, v in found["phases"].items()},
                flush=True,
            )
            subprocess.run(["rm", "-rf", str(folder / "run"), str(folder / "warm")], check=True)
    with atomic_write(TABLE) as path:
        path.write_text(
            json.dumps({"commit": git_commit(short=True), "unit": "MiB", "cases": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 2 else main()
