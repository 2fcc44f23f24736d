"""A full disk: the run stops with a sentence, or waits until there is room, as run.on_full_disk says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from stepdistill.errors import FULL_DISK
from training.notices import warn

OnFullDisk = Literal["stop", "wait"]
Made = TypeVar("Made")

# Seconds between two tries.
PAUSE = 20.0


def with_room(policy: OnFullDisk, what: str, write: Callable[[], Made]) -> Made:
    """What `write` returns. It must leave nothing behind where it fails; `what` follows "the disk is full while".

    Raises:
        OSError: the disk is full and the policy is to stop; or anything else went wrong.
    """
    said = False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL_DISK or policy != "wait":
                raise
        if not said:
            warn("W08", f"the disk is full while {what}; free some space, and the run goes on by itself.")
        said = True
        time.sleep(PAUSE)
