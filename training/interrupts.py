"""Signals, taken between two steps: a checkpoint of half a step would go on as another run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

# Seconds after which a second signal is a person's, not the launcher's repetition of the first.
IMPATIENT = 2.0
# After these a run saves and ends; after `SAVING` it saves and goes on.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
SAVING = signal.SIGUSR1


class Asked:
    """What signals have asked for.

    Attributes:
        ending: the number of the first that asks for an end, 0 without one.
        saving: whether a checkpoint was asked for since the last `saved`.
    """

    def __init__(self) -> None:
        self.ending, self.saving = 0, False
        self._first = 0.0

    def note(self, number: int, frame: Any) -> None:
        """A signal handler."""
        if number == SAVING:
            self.saving = True
        elif not self.ending:
            self.ending, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > IMPATIENT:
            raise KeyboardInterrupt

    def saved(self) -> None:
        """There is a checkpoint now."""
        self.saving = False


@contextlib.contextmanager
def deferred() -> Iterator[Asked]:
    """Hold the signals back during the block; yields what tells whether one came.

    A second one that asks for an end, more than two seconds after the first, raises KeyboardInterrupt at once. Outside the
    main thread, where Python allows no handlers, nothing is held back.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # `nohup` has it ignored, and means it.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    taken = {*ENDING, SAVING} - ignored
    before = {number: signal.signal(number, asked.note) for number in taken}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            # None where it was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
