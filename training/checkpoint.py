"""The run directory: what a run leaves behind, written so that no crash or full disk costs a finished part.

    recipe.yaml metrics.jsonl previews/ checkpoints/<step>/ student/ results/

A checkpoint is a directory of safetensors and JSON; nothing is ever pickled. It is written under a temporary
name and renamed when complete; `state.json`, written last, lists the other files with their sizes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.config import dump, read_yaml
from stepdistill.errors import UserError, atomic_write
from training.files import flush, save_tensors
from training.recipe import Recipe, differences

_OWN = (
    "recipe.yaml",
    "metrics.jsonl",
    "tensorboard",
    "previews",
    "checkpoints",
    "student",
    "lora",
    "results",
)


@dataclass(frozen=True)
class Checkpoint:
    """What `RunDirectory.save` was given; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Any]]
    extra: dict[str, Any]

    def load_into(self, name: str, module: nn.Module) -> None:
        """The weights of the network `name` into a module of the same make; every key must match.

        Raises:
            UserError: it is of another make, adapters in place of a whole network for one.
        """
        theirs, own = self.tensors.get(name, {}), module.state_dict()
        if {key: value.shape for key, value in theirs.items()} == {key: v.shape for key, v in own.items()}:
            module.load_state_dict(theirs)
            return
        held, wanted = (
            "adapters" if any(key.startswith("adapters.") for key in keys) else "a whole network"
            for keys in (theirs, own)
        )
        if held == wanted:
            held, wanted = "one of another size or rank", "this"
        raise UserError(
            f"the checkpoint of step {self.step} has {held} for {name!r}, and this recipe makes {wanted}; set student and"
            " method back to what the run was begun with, or use --fresh."
        )


class RunDirectory:
    """The directory of one run. With several processes, the main one alone writes; all may read.

    Attributes:
        keep: how many checkpoints are kept, beside the best one.
    """

    def __init__(self, out: str | Path, keep: int = 2) -> None:
        self.path = Path(out).expanduser()
        self.keep = keep
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.previews = self.path / "previews"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.results = self.path / "results"

    def begin(self, recipe: Recipe, fresh: bool = False) -> int:
        """Make the directory ready for `recipe` and return how many steps of it are done: 0 for a new run.

        Raises:
            UserError: the directory holds another run, or one that `run.resume=false` forbids to go on with.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.out={self.path} is a file; name a directory.")
        if fresh:
            self.clear()
        step = self.latest()
        if step is not None or self.student.exists():
            self.check(recipe)
            if not recipe.run.resume:
                raise UserError(
                    f"{self.path} holds a run already and run.resume is false; choose another directory"
                    " with run.out=..., or start over with --fresh."
                )
        try:
            self.previews.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = os.strerror(error.errno or 0)
            raise UserError(
                f"run.out={self.path} cannot be written to ({why}); choose another directory."
            ) from None
        # Left over from a save that was killed.
        for left_over in self.checkpoints.glob(".*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with atomic_write(self.recipe) as temporary:
            temporary.write_text(dump(recipe), encoding="utf-8")
        return step or 0

    def check(self, recipe: Recipe) -> None:
        """UserError when the run in the directory is of another family, method or student than `recipe`."""
        if not self.recipe.exists():
            return
        old, new = _identity(read_yaml(self.recipe)), _identity(yaml.safe_load(dump(recipe)))
        if any(name.startswith("stages.") for name in old):
            # Stages may be added at the end.
            new = {name: part for name, part in new.items() if name in old}
        changed = differences(old, new)
        if changed:
            name, before, now = changed[0]
            raise UserError(
                f"{self.path} holds a run with {name}={_shown(before)}, and this recipe has {_shown(now)};"
                " choose another directory with run.out=..., or start over with --fresh."
            )

    def clear(self) -> None:
        """Remove what a run left here; anything else in the directory stays."""
        if not self.recipe.exists():
            # Not the directory of a run: nothing here is ours.
            return
        for name in _OWN:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        optimizers: Mapping[str, Mapping[str, Any]],
        extra: Mapping[str, Any],
    ) -> Path:
        """Write checkpoints/<step>/, then remove the ones that are no longer kept.

        tensors: a state dict per network ("student", "student_ema", "ladd/discriminator", ...).
        optimizers: torch's `state_dict()` of each, by name. extra: plain values, as JSON holds them.
        If writing fails, the older checkpoints are as they were; a full disk raises OSError(ENOSPC).
        """
        target = self.checkpoints / str(step)
        with atomic_write(target) as folder:
            folder.mkdir()
            for name, state in tensors.items():
                save_tensors(folder / f"{_stem(name)}.safetensors", state)
            for name, state in optimizers.items():
                _write_optimizer(folder / f"{_stem(name)}.optimizer", state)
            _write_json(folder / "extra.json", extra)
            files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            names = {"networks": list(tensors), "optimizers": list(optimizers)}
            _write_json(folder / "state.json", {"format": 2, "step": step, **names, "files": files})
        self._prune()
        return target

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        numbered = [path for path in self.checkpoints.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in numbered if _complete(path))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def chosen(self, which: str) -> int:
        """The step that "latest", "best" or a number stands for.

        Raises:
            UserError: there is none such.
        """
        found = {"latest": self.latest(), "best": (self.best() or (None,))[0]}.get(which, which)
        if found is None or not str(found).isdecimal():
            raise UserError(
                f"checkpoint {which}: give a step, 'best' or 'latest'; {self.path} has checkpoints of steps"
                f" {self.steps()}."
            )
        return int(found)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder = self.checkpoints / str(step)
        if not _complete(folder):
            raise UserError(
                f"there is no complete checkpoint {folder}; complete are the steps {self.steps()}."
            )
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            tensors = {name: load_file(folder / f"{_stem(name)}.safetensors") for name in state["networks"]}
            optimizers = {
                name: _read_optimizer(folder / f"{_stem(name)}.optimizer") for name in state["optimizers"]
            }
            extra = json.loads((folder / "extra.json").read_text(encoding="utf-8"))
            return Checkpoint(state["step"], tensors, optimizers, extra)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint {folder} is damaged ({error}); remove it to go on from the one before."
            ) from None

    def record_best(self, step: int, metric: float, lower_is_better: bool = True) -> bool:
        """Note the metric of `step`. True if it is the best yet, whose checkpoint is never pruned."""
        best = self.best()
        if math.isnan(metric):
            return False
        if best is not None and (metric >= best[1] if lower_is_better else metric <= best[1]):
            return False
        with atomic_write(self.checkpoints / "best.json") as temporary:
            _write_json(temporary, {"step": step, "metric": metric})
        # The one that was best before may go now.
        self._prune()
        return True

    def best(self) -> tuple[int, float] | None:
        """(step, metric) of the best measurement so far."""
        try:
            best = json.loads((self.checkpoints / "best.json").read_text(encoding="utf-8"))
            return best["step"], best["metric"]
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _prune(self) -> None:
        steps, best = self.steps(), self.best()
        for step in steps[: -self.keep]:
            if best is None or step != best[0]:
                shutil.rmtree(self.checkpoints / str(step))


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8")
    flush(path)


def _stem(network: str) -> str:
    """A composition's networks are called "part/name"; a file cannot be."""
    return network.replace("/", "+")


def _write_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    """PATH.safetensors with the tensors of every parameter's state, PATH.json with the groups' settings."""
    tensors = {
        f"state.{number}.{key}": value
        for number, part in state["state"].items()
        for key, value in part.items()
    }
    save_tensors(path.with_name(f"{path.name}.safetensors"), tensors)
    _write_json(path.with_name(f"{path.name}.json"), {"param_groups": state["param_groups"]})


def _read_optimizer(path: Path) -> dict[str, Any]:
    """What `_write_optimizer` wrote, and what format 1 did, whose JSON marks a tuple as {"__tuple__": [...]}."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(path.with_name(f"{path.name}.safetensors")).items():
        _, number, key = name.split(".")
        states.setdefault(int(number), {})[key] = tensor
    groups = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))["param_groups"]
    for group in groups:
        betas = group["betas"]
        group["betas"] = tuple(betas["__tuple__"] if isinstance(betas, dict) else betas)
    return {"state": dict(sorted(states.items())), "param_groups": groups}


def _complete(folder: Path) -> bool:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a written recipe that a checkpoint depends on."""
    parts = {name: recipe.get(name) or {} for name in ("family", "method", "student")}
    stages = recipe.get("stages") or []
    for i, stage in enumerate(stages):
        parts[f"stages.{i}"] = {name: stage.get(name) or {} for name in ("method", "student")}
    return parts


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
