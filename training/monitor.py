"""What one sees of a run: lines of its log, warnings, previews, and the metric that picks the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from training.checkpoint import RunDirectory
from training.data import Source
from training.disk import with_room
from training.exporting import ExportedStudent
from training.health import Health
from training.measure import measure
from training.meters import Meters
from training.notices import warn
from training.patience import Patience, record, recorded
from training.preview import Preview, taught_guidance
from training.recipe import Recipe
from training.seeds import Seeds
from training.sharding import Sharding, settle
from training.state import TrainState
from training.trackers import log_picture

# Of the values that `Seeds` gives.
RATIOS = "samples/"


class Monitor:
    """Watches one stage.

    Args:
        student: what is drawn and measured: by the main process alone, or by all where each holds a part of it.
        state: the stage's, which is only read.

    Attributes:
        meters: what is observed until the next line of the log.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        method: Method,
        family: Family,
        source: Source,
        directory: RunDirectory,
        state: TrainState,
        student: ExportedStudent,
    ) -> None:
        self.run, self.optim, self.accelerator = recipe.run, recipe.optim, accelerator
        self.family, self.directory, self.state, self.student = family, directory, state, student
        self.meters, self.health = Meters(), Health(method, self.run.log_every)
        self._preview = Preview(method, family, source, self.run.preview_count, self.run.seed)
        self.patience = Patience(self.run.patience if self.run.stop == "patience" else 0)
        self._seeds = Seeds(family, source, taught_guidance(method))
        # What trains a teacher from data may begin from any, random weights too: no measure of it.
        self._replaces_teacher = method.leaves_teacher and not method.needs_teacher
        self._measured = directory.checkpoints / "measured.json"
        # The last step at which they were.
        self._drawn_at = -1
        self._samples_logged = 0
        self._draws = accelerator.is_main_process or Sharding.of(accelerator) is not None

    def log(self, bar: tqdm) -> None:
        """One line of the log: means since the last one, speed, rate, and what the health panel derives."""
        step, samples = self.state.global_step, self.state.samples
        self.meters.share(self.accelerator)
        values, seconds = self.meters.means(), self.meters.total("/seconds")
        self.meters.reset()
        # Phases of unequal pace draw unequal numbers of batches: images are counted, not guessed.
        speed = (samples - self._samples_logged) / seconds
        self._samples_logged = samples
        rate = self.optim.lr * self.optim.lr_factor(self.state.step - 1, self.run.steps)
        values |= {"images_per_second": speed, "samples": samples, "lr": rate}
        derived, warnings = self.health.check(values)
        values |= derived
        self.accelerator.log(values, step)
        if self.accelerator.is_main_process:
            self._warn(warnings)
        shown = {name: f"{value:.3g}" for name, value in values.items() if name.endswith("/total")}
        bar.set_postfix(shown | {"images/s": f"{speed:.0f}"}, refresh=False)

    def preview(self, networks: Mapping[str, nn.Module]) -> None:
        """Draw previews/STEP.png, with the health panel as it was at the last line of the log."""
        if not self._draws:
            return
        settle(networks.values())
        step = self.state.global_step
        with self.student.weights():
            ratios = self._ratios(step)
            # Before the picture, which shows the panel.
            self._log_ratios(ratios, step)
            picture = self._preview.draw(self.student.sampler(step), networks, self.health.lines())
        if self.accelerator.is_main_process:
            path = self._picture
            self.directory.put(path, lambda temporary: picture.save(temporary, format="PNG"))
            log_picture(self.accelerator.trackers, "preview", path, step)

    @property
    def _picture(self) -> Path:
        return self.directory.previews / f"{self.state.global_step:07d}.png"

    def measure(self) -> None:
        """The recipe's metric of the exported weights, whose checkpoint is there already; the best one is kept."""
        metric, step = self.run.metric, self.state.global_step
        if self._draws:
            with self.student.weights():
                value = measure(self.run, self.family, self.student.sampler(step))
                ratios = self._ratios(step)
        if self.accelerator.is_main_process:
            self._log_ratios(ratios, step)
            lower = value.better == "lower"
            with_room(
                self.run.on_full_disk,
                f"writing {self._measured}",
                lambda: record(self._measured, step, value.value, value.se, lower),
            )
            self.patience.see(value.value, value.se, lower)
            best = self.directory.record_best(step, value.value, lower)
            self.accelerator.log({f"metric/{metric}": value.value}, step)
            tqdm.write(f"step {step}: {metric} = {value.value:.4g}{' (best)' if best else ''}")
            if self.patience.over:
                tqdm.write(
                    f"step {step}: {metric} has not improved by more than its standard error in {self.patience.waited}"
                    " measurements; the run stops here (run.stop=patience)"
                )
        self.accelerator.wait_for_everyone()

    def pending(self) -> tuple[bool, bool]:
        """(metric, preview): which of them were due at this step and a kill has prevented; the same in all processes."""
        step, run = self.state.step, self.run
        metric = bool(run.metric_every) and step > 0 and step % run.metric_every == 0
        preview = bool(run.preview_every) and step % run.preview_every == 0
        ratios: dict[str, float] = {}
        if step:
            logged = self.directory.logged(self.state.global_step)
            metric = metric and f"metric/{run.metric}" not in logged
            preview = preview and not self._picture.exists()
            ratios = {
                name: value for name, value in logged.items() if name.startswith(RATIOS) and value is not None
            }
        metric, preview, ratios = broadcast_object_list([metric, preview, ratios])
        if ratios:
            # Said and logged before the kill, and after the checkpoint that was gone on from.
            self._drawn_at = self.state.global_step
            self.health.check(ratios)
        return metric, preview

    def _ratios(self, step: int) -> dict[str, float]:
        """What seeds of a few prompts say of saturation and collapse; the run's start has neither. Once a step."""
        if not step or self._drawn_at == step or self._replaces_teacher:
            return {}
        self._drawn_at = step
        return self._seeds.ratios(self.student.sampler(step))

    def _log_ratios(self, ratios: dict[str, float], step: int) -> None:
        if ratios and self.accelerator.is_main_process:
            self.accelerator.log(ratios, step)
            self._warn(self.health.check(ratios)[1])

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            warn("W06", f"step {self.state.global_step}: {warning}")

    def state_dict(self) -> dict[str, Any]:
        """What the next line of the log needs of before, as plain values; the health panel has its own."""
        return {"sums": self.meters.sums, "samples_logged": self._samples_logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.meters.sums = state.get("sums", {})
        self._samples_logged = state.get("samples_logged", self.state.samples)
        self._remember()

    def _remember(self) -> None:
        """What was measured before the checkpoint that the run goes on from, and at it: that follows its writing."""
        step, offset = self.state.global_step, self.state.offset
        done = f"metric/{self.run.metric}" in self.directory.logged(step)
        for at, value, se, lower in recorded(self._measured):
            # Of this step, one that a kill kept from the log is made again.
            if offset < at < step or (at == step and done):
                self.patience.see(value, se, lower)
