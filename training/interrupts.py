"""Ctrl-C and SIGTERM, taken between two steps: a checkpoint of half a step would go on as another run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Seconds after which a second signal is a person's, not the launcher's repetition of the first.
IMPATIENT = 2.0


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Hold SIGINT and SIGTERM back during the block; yields a function that tells whether one came.

    A second one, more than two seconds after the first, raises KeyboardInterrupt at once. Outside the main
    thread, where Python allows no handlers, nothing is held back.
    """
    first: list[float] = []

    def note(number: int, frame: Any) -> None:
        if first and time.monotonic() - first[0] > IMPATIENT:
            raise KeyboardInterrupt
        if not first:
            first.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
