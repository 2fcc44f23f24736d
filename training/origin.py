"""What a run is made from, by checksum: the teacher's weights, which may not change on the way, and the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.provenance import sha256_of_weights
from training.notices import warn
from training.saved import Checkpoint


class Origin:
    """Of one stage.

    Args:
        data: fingerprint and words, see `Batches.data`.
        main: whether this process speaks.
    """

    def __init__(self, family: Family, data: Mapping[str, str], main: bool) -> None:
        self.family, self.data, self.main = family, data, main
        self._teacher: str | None = None

    @property
    def teacher(self) -> str:
        """Checksum of the teacher's weights, "" without one; computed once."""
        if self._teacher is None:
            teacher = self.family.teacher
            self._teacher = "" if teacher is None else sha256_of_weights(teacher)
        return self._teacher

    def remember(self) -> None:
        """Compute it now, before the teacher is cut into shards."""
        _ = self.teacher

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"data": dict(self.data), "teacher": self.teacher}

    def check(self, checkpoint: Checkpoint) -> None:
        """Say where the data have changed since a checkpoint.

        Raises:
            UserError: the teacher has.
        """
        before = checkpoint.extra.get("data")
        if self.main and before and before["fingerprint"] != self.data["fingerprint"]:
            warn(
                "W03",
                f"the data are not those of the checkpoint, so their order is another from here on; they were"
                f" {before['said']}, and are {self.data['said']}",
            )
        if checkpoint.extra.get("teacher", self.teacher) != self.teacher:
            raise UserError(
                f"the teacher's weights are not those the checkpoint of step {checkpoint.step} was trained with; bring them"
                " back, or start over with --fresh."
            )
