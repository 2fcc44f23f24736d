"""What a run does about a loss or a gradient that is not finite: it stops, or leaves the update out, so many times."""

from __future__ import annotations

from stepdistill.errors import UserError
from training.checkpoint import RunDirectory
from training.notices import warn
from training.sections import RunConfig
from training.state import TrainState


class NonFinite:
    """The policy of a stage, `run.on_nonfinite` with `run.nonfinite_budget`.

    Args:
        main: whether this process speaks.
    """

    def __init__(self, run: RunConfig, directory: RunDirectory, state: TrainState, main: bool) -> None:
        self.run, self.directory, self.state, self.main = run, directory, state, main

    @property
    def skips(self) -> bool:
        """Whether an update may be left out."""
        return self.run.on_nonfinite == "skip"

    def loss(self, what: str) -> None:
        """A loss is not finite. Raises UserError unless updates may be left out; the gradient then tells all processes."""
        if not self.skips:
            raise UserError(self.directory.diverged(what, self.state.global_step))

    def gradient(self, what: str) -> None:
        """A gradient is not finite in any process, so its update is left out.

        Raises:
            UserError: it may not be, or no longer.
        """
        step, budget = self.state.global_step, self.run.nonfinite_budget
        if not self.skips:
            raise UserError(self.directory.diverged(what, step))
        self.state.skipped += 1
        if self.state.skipped > budget:
            raise UserError(
                f"{self.directory.diverged(what, step)} {budget} updates were left out before"
                " (run.nonfinite_budget)."
            )
        if self.main:
            warn(
                "W07",
                f"step {step}: {what} is not finite, and this update is left out ({self.state.skipped} of"
                f" {budget} that may be).",
            )
