"""A student out of a run: its card, its weights, and any checkpoint's, without the data they were trained on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepdistill import card as cards
from stepdistill import export
from stepdistill.card import Card
from stepdistill.denoiser import Denoiser
from stepdistill.drawing import Sampler
from stepdistill.ema import EMA
from stepdistill.errors import UserError, first_line
from stepdistill.families.base import Family
from stepdistill.methods.assemble import new_student
from stepdistill.methods.base import Method
from training.checkpoint import Checkpoint, RunDirectory
from training.files import lines_of
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
        trained = [module for module in self.student.modules() if module.training]
        self.student.eval()
        average = self.ema.applied(self.student) if self.card.average else contextlib.nullcontext()
        try:
            with average:
                yield
        finally:
            # Dropout layers may be the only ones.
            for module in trained:
                module.training = True

    def put(self) -> Denoiser:
        """The network, carrying the exported weights, in eval mode, for good."""
        if self.card.average:
            self.ema.put(self.student)
        return self.student.eval()

    def sampler(self, step: int) -> Sampler:
        """Draws with the network as it is now; use it inside `weights` or after `put`."""
        return Sampler(self.card.family, self.student, self.directory, self.card.at(step), self.device)

    def write(self, step: int, made: Exported | None = None) -> None:
        """Write the pipeline directory; after `put`. made: the same student from its checkpoint, where this process holds
        a part of it alone.
        """
        run = RunDirectory(self.directory.parent)
        card, family, student = self.card.at(step), self.card.family, self.student
        if made is not None:
            family, student = made.family, made.student
        export.write(family, student, self.directory, card, measured_by(run, card))


@dataclass(frozen=True)
class Exported:
    """The student of one checkpoint, carrying the weights that are exported, and its card."""

    family: Family
    student: Denoiser
    card: Card

    @classmethod
    def of(cls, recipe: Recipe, which: str) -> Exported:
        """which: a step, "best" or "latest".

        Raises:
            UserError: there is no such checkpoint, or it is of another recipe.
        """
        directory = RunDirectory(recipe.run.out, recipe.run.keep)
        directory.check(recipe)
        # What is wrong with the recipe is said before weights are read.
        stages = [(stage, stage.new_method()) for stage in recipe.stages()]
        checkpoint = directory.load(directory.chosen(which))
        stage, method = stages[checkpoint.extra["stage"]]
        family = stage.new_family()
        student = new_student(method, family, stage.student.init, stage.student.lora)
        made = StudentCard(stage, recipe, method, family, _routing(checkpoint, stage))
        checkpoint.load_into("student", student)
        if made.average:
            # An average has the names of the parameters it follows, and its count of updates.
            own = student.state_dict()
            followed = {name: own[name] for name in checkpoint.shapes("student_ema") if name != "updates"}
            checkpoint.read("student_ema", followed)
            student.load_state_dict(own)
        return cls(family, student.eval(), _as_made(directory.student, made.at(checkpoint.step)))


def measured_by(run: RunDirectory, card: Card) -> export.Measured:
    """What a run knows of the student of a card: the metric it was watched by at that step, and the rows of its
    results/results.json that are of a directory of the same content, or of the run's own of that student.
    """

    def numbers(directory: Path) -> dict[str, str]:
        watched = {
            name.removeprefix("metric/"): f"{value:.4g}"
            for line in lines_of(run.metrics)
            if line.get("step") == card.step
            for name, value in line.items()
            if name.startswith("metric/") and isinstance(value, float)
        }
        places = [directory, *([run.student] if _card_in(run.student) == card else [])]
        return watched | _results(run.results / "results.json", places)

    return numbers


def _results(path: Path, places: Sequence[Path]) -> dict[str, str]:
    """The main numbers of a results file, where they are of what lies in one of the directories."""
    from evaluation.generate import pipeline_sha256
    from evaluation.values import readings

    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        contents = {pipeline_sha256(place) for place in places}
        rows = [row for row in results["rows"] if row["sha256"] in contents]
        main = [reading for reading in readings(results).values() if reading.main]
        found = {}
        for row in rows:
            steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
            for reading in main:
                value, error = row["metrics"].get(reading.name), row["metrics"].get(f"{reading.name}/se")
                if value is not None:
                    # A companion's protocol says its own number of samples.
                    drawn = reading.protocol or f"n = {row['n']}, {results['protocol']}"
                    found[f"{reading.name} at {steps} ({drawn})"] = f"{value:.4g}" + (
                        f" ± {error:.2g}" if error else ""
                    )
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); measure again, or remove it to export without its numbers."
        ) from None


def _as_made(directory: Path, card: Card) -> Card:
    """The card, with the commit it was first exported at, where that student lies in `directory`: what was measured on it
    is known by its checksum.
    """
    made = _card_in(directory)
    same = made is not None and card == replace(made, commit=card.commit, stepdistill=card.stepdistill)
    return made if same else card


def _card_in(directory: Path) -> Card | None:
    try:
        return cards.read(directory)
    except UserError:
        # Damaged, so nobody's.
        return None


def _routing(checkpoint: Checkpoint, stage: Recipe) -> dict[str, Any] | None:
    """The partition's rule; only for a checkpoint that does not keep it is the data opened again."""
    if "routing" in checkpoint.extra:
        return checkpoint.extra["routing"]
    return stage.data.make().routing
