"""What two processes train beside what one trains, for many methods, in copies and in shards: benchmarks/processes.json.

    OMP_NUM_THREADS=1 python tests/processes.py [NAME ...]      rows that are not named stay

Every row trains three iterations at a global batch of 4: in one process, in two that hold copies (DDP), in two that hold
shards (FSDP2). Numbers are the largest difference of any weight or average; `movement` is the largest step of any in one
iteration. The optimisers' eps is large, since Adam counts the rounding of a gradient near zero in full.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forks import two_processes
from runs import GAN, LCM, checkpoint, labelled_images, same
from stand_ins import CLASSES

from stepdistill.config import apply_overrides
from stepdistill.denoiser import unwrap
from training import run as running
from training.checkpoint import Checkpoint, RunDirectory
from training.recipe import Recipe, recipe_from
from training.sharding import full
from training.trainer import Trainer

TABLE = Path(__file__).parents[1] / "benchmarks" / "processes.json"
STEPS = 3
AT_ONCE = 2
LORA = {"student": {"lora": {"rank": 2}}}
CHECKPOINTED = {"student": {"gradient_checkpointing": True}}
Sections = Mapping[str, Mapping[str, Any]]
# Row -> (tiny teacher, method, further sections). Of the first ones, resuming is tried too.
RESUMED: dict[str, tuple[str, Mapping[str, Any], Sections]] = {
    "dmd2 with a GAN": ("sd15", GAN, {}),
    "scm": ("sd3", {"name": "scm", "warmup": 2}, {}),
    "ladd": ("sd3", {"name": "ladd", "warmup": 1, "gan": "non_saturating"}, {}),
    "lcm": ("sd15", LCM, {}),
    "dmd2, student and fake score LoRAs": (
        "sd3", {"name": "dmd2", "student_every": 1, "fake_score_lora": {"rank": 2}}, LORA,
    ),
}  # fmt: skip
# A stage begins from the checkpoint of the one before, in whatever form that is.
STAGES = (
    {"method": LCM, "run": {"steps": 2}},
    {"method": {"name": "dmd2", "student_every": 1}, "run": {"steps": 1}},
)
OTHERS: dict[str, tuple[str, Mapping[str, Any], Sections]] = {
    "lcm, then dmd2": ("sd15", {}, {"stages": STAGES}),
    # Products are rounded to 3 digits, in whatever parts of a batch they are made.
    "dmd2 with a GAN, bf16": ("sd15", {**GAN, "student_every": 1}, {"run": {"precision": "bf16"}}),
    "dmd2 with a GAN, checkpointed": ("sd3", {**GAN, "student_every": 1}, CHECKPOINTED),
    "dmd2, LoRAs, checkpointed": (
        "flux-dev", {"name": "dmd2", "student_every": 1, "fake_score_lora": {"rank": 2}},
        {"student": {**LORA["student"], **CHECKPOINTED["student"]}},
    ),
    "lightning": ("sd3", {"name": "lightning"}, {"student": {"steps": [2]}}),
    **{name: ("sd15", {"name": name, "pair_count": 8, "pair_steps": 2}, {}) for name in ("dmd", "kd")},
    **{name: ("sd15", {"name": name}, {}) for name in ("sid", "sida", "vsd", "cd", "ect", "tscd", "meanflow", "pretrain")},
    **{
        name: ("sd3", {"name": name}, {})
        for name in ("sim", "diff_instruct", "f_distill", "decoupled_dmd", "cdm", "disback")
    },
    # Whose output layer asks a part of the first block.
    "dit, dmf": ("dit", {"name": "dmf"}, {}),
}  # fmt: skip
CASES = RESUMED | OTHERS


def recipe(name: str, out: Path, *overrides: str) -> Recipe:
    teacher, method, sections = CASES[name]
    family = {"name": tiny.VARIANTS[teacher][0], "teacher": str(tiny.directory(teacher))}
    data = {"name": "scenes", "size": 24}
    if family["name"] in CLASSES:
        images = out.parent / "images"
        if not images.is_dir():
            labelled_images(images, CLASSES[family["name"]], each=1, size=32)
        data = {"name": "folder", "path": str(images)}
    else:
        family["resolution"] = [32]
    run = {
        "precompute": "never",
        "check_teacher": False,
        "save_every": 1,
        "keep": 9,
        "log_every": 1,
        "trackers": [],
    }
    made = {
        "family": family, "student": {"steps": [1, 2], "ema": 0.5, **sections.get("student", {})},
        "data": {**data, "resolution": 32}, "optim": {"lr": 1e-3, "batch_size": 4, "eps": 1e-3},
        "run": {**run, **sections.get("run", {}), "out": str(out)},
    }  # fmt: skip
    if "stages" in sections:
        made["stages"] = list(sections["stages"])
    else:
        made["method"], made["run"]["steps"] = dict(method), STEPS
    return recipe_from(apply_overrides(made, overrides))


def train(
    rank: int, recipes: Mapping[str, Recipe], told: Path, shards: bool, after: Mapping[str, tuple[Path, int]]
) -> None:
    """In a process: run all; what it ended with, in `told`."""
    if shards:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    sums, fit = {}, Trainer.fit
    # It would end what processes talk by, and the next run has nothing.
    Accelerator.end_training = lambda self: None
    for name, each in recipes.items():

        def watched(trainer: Trainer, name: str = name) -> Any:
            assert trainer.accelerator.num_processes == 2 and bool(trainer.sharding) == shards
            wanted = trainer.recipe.student.gradient_checkpointing
            assert checkpointed(trainer.modules["student"]) == wanted
            student = fit(trainer)
            sums[name] = digest({key: module.state_dict() for key, module in trainer.modules.items()})
            return student

        Trainer.fit = watched
        # The other process waits for what the main one finds there.
        if name in after and rank == 0:
            from_step(*after[name], Path(each.run.out))
        AcceleratorState._reset_state()
        try:
            running.run(each)
        finally:
            Trainer.fit = fit
    told.with_suffix(f".{rank}").write_text(json.dumps(sums))


def checkpointed(student: torch.nn.Module) -> bool:
    """Of adapters, their base's network, which is no module of theirs."""
    return any(
        getattr(each, "is_gradient_checkpointing", False) for each in unwrap(student).network.modules()
    )


def digest(state: Any) -> str:
    import hashlib

    if isinstance(state, Mapping):
        return hashlib.sha256("".join(f"{k}={digest(v)};" for k, v in state.items()).encode()).hexdigest()
    state = full(state)
    return hashlib.sha256(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def in_two(
    recipes: Mapping[str, Recipe], shards: bool, after: Mapping[str, tuple[Path, int]] | None = None
) -> dict[str, bool]:
    """Whether both processes ended with the same weights, by name. after: of what goes on, the run and the step."""
    with tempfile.TemporaryDirectory() as folder:
        two_processes(train, recipes, Path(folder) / "sums", shards, after or {})
        first, second = (json.loads((Path(folder) / f"sums.{rank}").read_text()) for rank in (0, 1))
    return {name: first[name] == second[name] for name in recipes}


def difference(a: Checkpoint, b: Checkpoint, networks: Iterable[str] = ()) -> float:
    """The largest of any weight, of these networks or of all, which must be the same."""
    assert networks or a.tensors.keys() == b.tensors.keys()
    return max(
        float((value.double() - b.tensors[name][key].double()).abs().max())
        for name in networks or a.tensors
        for key, value in a.tensors[name].items()
        if value.numel() and key != "updates"
    )


def from_step(out: Path, step: int, new: Path) -> Path:
    """A copy of a run as it was after `step`."""
    shutil.copytree(out, new)
    shutil.rmtree(new / "student", ignore_errors=True)
    for later in RunDirectory(new).steps():
        if later > step:
            shutil.rmtree(new / "checkpoints" / str(later))
    return new


def measure(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by name."""
    settings = ("optim.micro_batch_size=2",)
    made = {name: folder / str(number) for number, name in enumerate(names)}
    place = {kind: {name: Path(f"{made[name]}-{kind}") for name in names} for kind in ("one", "ddp", "fsdp")}
    recipes = {kind: {name: recipe(name, out) for name, out in place[kind].items()} for kind in place}
    for each in recipes["one"].values():
        # Which keeps the precision of the run before.
        AcceleratorState._reset_state()
        running.run(each)
    alike = {kind: in_two(recipes[kind], kind == "fsdp") for kind in ("ddp", "fsdp")}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        one, before = checkpoint(place["one"][name]), checkpoint(place["one"][name], STEPS - 1)
        # A stage may have networks that the one before had not.
        moved = difference(one, before, one.tensors.keys() & before.tensors.keys())
        rows[name] = {"teacher": CASES[name][0], "movement": moved}
        for kind in ("ddp", "fsdp"):
            rows[name][kind] = difference(one, checkpoint(place[kind][name]))
            rows[name][f"{kind} processes alike"] = alike[kind][name]
    resumed = [name for name in names if name in RESUMED]
    ends = {
        f"{a} to {b}": {
            name: recipe(name, from_step(place[a][name], STEPS - 1, Path(f"{made[name]}-{a}-to-{b}")), *settings)
            for name in resumed
        }
        for a, b in (("fsdp", "fsdp"), ("ddp", "ddp"), ("fsdp", "one"), ("one", "fsdp"), ("ddp", "fsdp"))
    }  # fmt: skip
    for kind in ("ddp", "fsdp"):
        in_two(
            {f"{k}|{n}": r for k, rs in ends.items() if k.endswith(f"to {kind}") for n, r in rs.items()},
            kind == "fsdp",
        )
    for each in ends["fsdp to one"].values():
        running.run(each)
    for kind, group in ends.items():
        a, b = kind.split(" to ")
        for name, each in group.items():
            here, there = checkpoint(Path(each.run.out)), checkpoint(place[a][name])
            rows[name][kind] = (
                same([here.tensors, here.optimizers], [there.tensors, there.optimizers])
                if a == b
                else difference(here, there)
            )
    return rows


def main() -> None:
    from stepdistill.errors import atomic_write, quieten_libraries
    from stepdistill.provenance import git_commit
    from training import precompute

    quieten_libraries()
    names = sys.argv[1:] or list(CASES)
    for first in range(0, len(names), AT_ONCE):
        with tempfile.TemporaryDirectory() as temporary:
            precompute.CACHE = Path(temporary) / "cache"
            found = measure(names[first : first + AT_ONCE], Path(temporary))
        print(json.dumps(found, indent=1), flush=True)
        kept = json.loads(TABLE.read_text())["rows"] if TABLE.is_file() else {}
        made = {"commit": git_commit(short=True), "torch": torch.__version__}
        rows = kept | {name: row | made for name, row in found.items()}
        with atomic_write(TABLE) as path:
            path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
