"""The run directory: what a run leaves behind, written so that no crash or full disk costs a finished part.

    recipe.yaml metrics.jsonl previews/ checkpoints/<step>/ student/ results/

A checkpoint is written under a temporary name and renamed when complete; `training.saved` says what it holds. One that
is no longer what was written is set aside as checkpoints/damaged-<step>, and the newest whole one is gone on from.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stepdistill.config import dump
from stepdistill.errors import FULL_DISK, UserError, atomic_write
from stepdistill.yaml_files import read_yaml
from training import identity, saved
from training.disk import OnFullDisk, with_room
from training.files import flush, remove
from training.launch import is_main, together
from training.lock import Lock
from training.notices import notice
from training.recipe import Recipe, recipe_from
from training.run_files import RunFiles
from training.saved import Checkpoint, Damaged

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
# There from the moment a run is to be started over until the new one's recipe lies there.
_CLEARING = ".clearing"


class RunDirectory(RunFiles):
    """The directory of one run. With several processes, the main one alone writes; all may read.

    Attributes:
        keep: how many checkpoints are kept, beside the best one.
        notes: what `begin` found that a person should hear of, sentences.
    """

    def __init__(self, out: str | Path, keep: int = 2, on_full_disk: OnFullDisk = "stop") -> None:
        super().__init__(out, on_full_disk)
        self.keep = keep
        self.notes: list[str] = []
        self.lock = Lock(self.path / ".lock")
        # Steps whose checksums were right.
        self._sound: set[int] = set()

    def begin(self, recipe: Recipe, fresh: bool = False) -> int:
        """Make the directory ready for `recipe`, lock it, and return how many steps of it are done: 0 for a new run.

        Raises:
            UserError: the directory holds another run, or one that `run.resume=false` forbids to go on with, or one that is
                at work, or checkpoints none of which is whole.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.out={self.path} is a file; name a directory.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.lock.take():
                raise self.lock.refused()
            return self._begin(recipe, fresh)
        except OSError as error:
            self.lock.release()
            if error.errno in FULL_DISK:
                raise
            why = os.strerror(error.errno or 0)
            raise UserError(
                f"run.out={self.path} cannot be written to ({why}); choose another directory."
            ) from None
        except UserError:
            self.lock.release()
            raise

    def _begin(self, recipe: Recipe, fresh: bool) -> int:
        if fresh or self._clearing.exists():
            self.clear()
        step = self._newest()
        if step is not None or self.student.exists():
            self._permitted(recipe)
        step = self._without(recipe) if step is None else step
        self.previews.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self._tidy()
        with atomic_write(self.recipe) as temporary:
            temporary.write_text(dump(recipe), encoding="utf-8")
        self._clearing.unlink(missing_ok=True)
        if not step and self.metrics.is_file() and self.metrics.stat().st_size:
            self.notes.append(
                notice("W09", f"the run in {self.path} ended before its first checkpoint; it begins again.")
            )
        return step

    @property
    def _clearing(self) -> Path:
        return self.path / _CLEARING

    def _permitted(self, recipe: Recipe) -> None:
        """UserError where what lies here is not to be gone on with."""
        self.check(recipe)
        if not recipe.run.resume:
            raise UserError(
                f"{self.path} holds a run already and run.resume is false; choose another directory"
                " with run.out=..., or start over with --fresh."
            )

    def _newest(self) -> int | None:
        """Step of the newest whole checkpoint; newer ones are set aside. None where there never was one.

        Raises:
            UserError: there are some, and none is whole: starting over must be somebody's wish.
        """
        wrong: dict[int, str] = {}
        for step in reversed(self._numbered()):
            try:
                self._verify(step)
            except Damaged as damage:
                wrong[step] = str(damage)
                continue
            for each, why in wrong.items():
                self._set_aside(each)
                self.notes.append(
                    notice(
                        "W01",
                        f"the checkpoint of step {each} is damaged ({why}); going on from step {step}, and what was saved lies"
                        f" in {self._aside(each)}.",
                    )
                )
            return step
        if wrong:
            found = "; ".join(f"{step}: {why}" for step, why in sorted(wrong.items()))
            raise UserError(
                f"{self.checkpoints} has no whole checkpoint to go on from ({found}); bring one back, choose another"
                " directory with run.out=..., or start over with --fresh."
            )
        return None

    def _without(self, recipe: Recipe) -> int:
        """Steps of a run without checkpoints: all, where its student lies here, else none.

        Raises:
            UserError: the student here is of other steps, and nothing is left to go on from.
        """
        if not self.student.exists():
            return 0
        step = self.exported()
        if step == recipe.total_steps:
            return step
        raise UserError(
            f"{self.path} holds a student of step {step} and no checkpoint to go on from to {recipe.total_steps}; choose"
            " another directory with run.out=..., or start over with --fresh."
        )

    def _tidy(self) -> None:
        """Remove what writes that were killed left under hidden names; nobody else is at work here."""
        for place in (self.checkpoints, self.previews):
            remove(*place.glob(".*"))
        remove(*(left for name in _OWN for left in self.path.glob(f".{name}.*")))

    def check(self, recipe: Recipe) -> None:
        """UserError when the run in the directory is of another family, method, student or optimiser than `recipe`; what
        else differs is noted.
        """
        if not self.recipe.exists():
            return
        before = read_yaml(self.recipe)
        # What an older version did not write has its default; where one wrote what is no setting any more, that stands as it is.
        with contextlib.suppress(UserError):
            before = yaml.safe_load(dump(recipe_from(before)))
        fixed, free = identity.changes(before, yaml.safe_load(dump(recipe)))
        identity.refuse(self.path, fixed)
        if change := identity.said(free):
            self.notes.append(notice("W02", change))

    def clear(self) -> None:
        """Remove what a run left here; anything else in the directory stays. Killed half-way it is gone on with at the next
        start, so what is here is the old run or a new one.
        """
        if not self.recipe.exists() and not self._clearing.exists():
            # Not the directory of a run: nothing here is ours.
            return
        self._clearing.touch()
        remove(*(self.path / name for name in _OWN))

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
        self._finite(step, tensors, optimizers)
        target = self.checkpoints / str(step)
        self.put(target, lambda folder: saved.write(folder, step, tensors, optimizers, extra))
        self._sound.discard(step)
        self._prune()
        return target

    def save_shards(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        optimizers: Mapping[str, Mapping[str, Any]],
        extra: Mapping[str, Any],
    ) -> None:
        """`save` of networks in shards: every process calls it and writes what it holds, the main one the rest."""
        together(lambda: self._finite(step, tensors, optimizers))
        target, main = self.checkpoints / str(step), is_main()

        def once() -> None:
            with atomic_write(target) if main else contextlib.nullcontext() as temporary:
                folder = Path(broadcast_object_list([str(temporary)])[0])
                written = together(lambda: saved.write_shards(folder, tensors, optimizers))
                sums = {name: sum_ for each in written for name, sum_ in each.items()}
                given = (folder, step, list(tensors), optimizers, extra, sums)
                together(lambda: saved.finish(*given) if main else None)

        with_room(self.on_full_disk, f"writing {target}", once)
        if main:
            self._sound.discard(step)
            self._prune()

    def _finite(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        optimizers: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """UserError where something is not; the log's lines up to here are on the disk before what goes on from here is."""
        if found := saved.not_finite(tensors, optimizers):
            raise UserError(self.diverged(f"{found}, to be saved,", step))
        if self.metrics.is_file():
            flush(self.metrics)

    def diverged(self, what: str, step: int) -> str:
        """A sentence on something that is not finite at `step`, and what to do."""
        kept = self.latest()
        return (
            f"{what} is not finite at step {step}; the last checkpoint is"
            f" {'none' if kept is None else f'step {kept}'}."
            " Lower optim.lr, set optim.max_grad_norm, or use run.precision=no."
        )

    def _numbered(self) -> list[int]:
        """Steps of all that was saved, ascending, whole or not; none while the directory is being cleared."""
        if not self.checkpoints.is_dir() or self._clearing.exists():
            return []
        return sorted(int(path.name) for path in self.checkpoints.iterdir() if path.name.isdecimal())

    def steps(self) -> list[int]:
        """Steps of all checkpoints whose files are there in their sizes, ascending."""
        return [step for step in self._numbered() if saved.complete(self.checkpoints / str(step))]

    def latest(self) -> int | None:
        """Step of the newest of `steps`."""
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

    def load(self, step: int, verify: bool = True) -> Checkpoint:
        """The checkpoint of `step`, every byte of which is as it was written.

        verify: False where another process has just seen to that.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder = self.checkpoints / str(step)
        if not saved.complete(folder):
            raise UserError(
                f"there is no complete checkpoint {folder}; complete are the steps {self.steps()}."
            )
        try:
            if verify:
                self._verify(step)
            return saved.read(folder)
        except Damaged as error:
            raise UserError(
                f"the checkpoint {folder} is damaged ({error}); remove it to go on from the one before."
            ) from None

    def _verify(self, step: int) -> None:
        """Raises `Damaged`. What this object has read once is not read again."""
        if step not in self._sound:
            saved.verify(self.checkpoints / str(step))
            self._sound.add(step)

    def _aside(self, step: int) -> Path:
        return self.checkpoints / f"damaged-{step}"

    def _set_aside(self, step: int) -> None:
        """Out of the way of what will be saved; of what is damaged, the last stays."""
        remove(*self.checkpoints.glob("damaged-*"))
        os.replace(self.checkpoints / str(step), self._aside(step))

    def record_best(self, step: int, metric: float, lower_is_better: bool = True) -> bool:
        """Note the metric of `step`. True if it is the best yet, whose checkpoint is never pruned."""
        best = self.best()
        if math.isnan(metric):
            return False
        if best is not None and (metric >= best[1] if lower_is_better else metric <= best[1]):
            return False
        content = {"step": step, "metric": metric}
        self.put(self.checkpoints / "best.json", lambda temporary: saved.write_json(temporary, content))
        # The one that was best before may go now.
        self._prune()
        return True

    def _prune(self) -> None:
        whole, best = self.steps(), self.best()
        # What is damaged and older than all that is kept goes too.
        oldest = whole[-self.keep :][0]
        for step in self._numbered():
            if step < oldest and (best is None or step != best[0]):
                shutil.rmtree(self.checkpoints / str(step))
