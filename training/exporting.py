"""A student out of a run: its card, its weights, and any checkpoint's, without the data they were trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill import export
from stepdistill.card import Card
from stepdistill.denoiser import Denoiser
from stepdistill.drawing import Sampler
from stepdistill.ema import EMA
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.assemble import new_student
from stepdistill.methods.base import Method
from training.checkpoint import Checkpoint, RunDirectory
from training.recipe import Recipe


@dataclass(frozen=True)
class StudentCard:
    """What makes the card of a run's student, at any step.

    Attributes:
        stage: the recipe of the last stage; whole: the one it came from.
        routing: by which rule conditions belong to the part of the data it was trained on, or None.
    """

    stage: Recipe
    whole: Recipe
    method: Method
    family: Family
    routing: dict[str, Any] | None

    @property
    def average(self) -> bool:
        """Whether the average of the weights is exported, not the weights themselves."""
        return self.stage.run.export == "ema" and self.stage.student.ema > 0

    def at(self, step: int) -> Card:
        """The card of the student of the global `step`."""
        recipe = self.stage.mapping()
        # With stages, `whole` may have no method of its own.
        if self.whole.partials:
            recipe["stages"] = self.whole.mapping()["stages"]
        weights = "ema" if self.average else "raw"
        facts = {"step": step, "weights": weights, "routing": self.routing or None}
        return export.card_of(self.family, self.method, recipe, **facts)


class ExportedStudent:
    """The student under training, as it would be exported now.

    Args:
        student: the network, which carries the exported weights only inside `weights` and after `put`.
        directory: where it is to lie.
    """

    def __init__(
        self, card: StudentCard, student: Denoiser, ema: EMA, directory: Path, device: torch.device
    ) -> None:
        self.card, self.student, self.ema = card, student, ema
        self.directory, self.device = directory, device

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """The network carries the exported weights, in eval mode, for the length of the block."""
        was_training = self.student.training
        self.student.eval()
        average = self.ema.applied(self.student) if self.card.average else contextlib.nullcontext()
        try:
            with average:
                yield
        finally:
            self.student.train(was_training)

    def put(self) -> Denoiser:
        """The network, carrying the exported weights for good."""
        if self.card.average:
            self.ema.put(self.student)
        return self.student

    def sampler(self, step: int) -> Sampler:
        """Draws with the network as it is now; use it inside `weights` or after `put`."""
        return Sampler(self.card.family, self.student, self.directory, self.card.at(step), self.device)

    def write(self, step: int) -> None:
        """Write the pipeline directory; after `put`."""
        export.write(self.card.family, self.student, self.directory, self.card.at(step))


def export_checkpoint(recipe: Recipe, which: str) -> str:
    """Export the weights (run.export: ema or raw) of one checkpoint to run.out/student-STEP-WEIGHTS.

    Args:
        which: a step, "best" or "latest".

    Raises:
        UserError: there is no such checkpoint, or it is of another recipe.
    """
    directory = RunDirectory(recipe.run.out, recipe.run.keep)
    directory.check(recipe)
    chosen = {"latest": directory.latest(), "best": (directory.best() or (None,))[0]}.get(which, which)
    if chosen is None or not str(chosen).isdecimal():
        raise UserError(
            f"--export {which}: give a step, 'best' or 'latest';"
            f" there are checkpoints of steps {directory.steps()}."
        )
    checkpoint = directory.load(int(chosen))
    stage = recipe.stages()[checkpoint.extra["stage"]]
    family: Family = stage.family.make()
    method = stage.new_method()
    student = new_student(method, family, stage.student.init, stage.student.lora)
    card = StudentCard(stage, recipe, method, family, _routing(checkpoint, stage))
    student.load_state_dict(checkpoint.tensors["student"])
    if card.average:
        # An average has the names of the parameters it follows, and its count of updates.
        followed = {
            name: tensor for name, tensor in checkpoint.tensors["student_ema"].items() if name != "updates"
        }
        student.load_state_dict(student.state_dict() | followed)
    target = directory.path / f"student-{chosen}-{recipe.run.export}"
    export.write(family, student.eval(), target, card.at(checkpoint.step))
    return f"exported to {target}"


def _routing(checkpoint: Checkpoint, stage: Recipe) -> dict[str, Any] | None:
    """The partition's rule; only for a checkpoint that does not keep it is the data opened again."""
    if "routing" in checkpoint.extra:
        return checkpoint.extra["routing"]
    return stage.data.make().routing
