"""Requests on their way to the worker: two lanes, a bound on each session's and on everybody's.

Students are short and wait in a lane of their own, which is served first. A session (a browser tab) has at
most `PER_SESSION` requests waiting; a further one takes the place of its oldest. All sessions together have
at most `QUEUE` waiting; beyond that a request is refused at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from app.request import Busy, Cancelled, Request

QUEUE = 64
PER_SESSION = 2
STOPPED = "stopped."
REPLACED = "a newer request took the place of this one."


@dataclass(eq=False)
class Job:
    """A request on its way.

    `future` gives the `Result`; `cancel` drops it from the queue or stops it at its next step.
    """

    request: Request
    session: str | None
    future: Future = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)
    # Steps done and in all, of the model that is drawing now.
    progress: tuple[int, int] = (0, 0)
    asked: float = field(default_factory=time.perf_counter)
    # What the client is answered when the job is cancelled.
    why: str = STOPPED
    # Seconds of this run in which requests of the other lane were served.
    lent: float = 0.0

    def cancel(self) -> None:
        self.stop.set()

    def refuse(self, error: Exception) -> None:
        """Settle the future of a job that will not run."""
        self.stop.set()
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Lanes:
    """The jobs that wait, by lane, and those that run. Safe to use from any thread.

    `change` is notified whenever a job is added or the lanes are closed.
    """

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.running: list[Job] = []
        self._waiting: dict[str, deque[Job]] = {"student": deque(), "teacher": deque()}
        self._closed: Exception | None = None

    def __len__(self) -> int:
        """How many jobs wait in both lanes."""
        return sum(len(lane) for lane in self._waiting.values())

    def add(self, job: Job) -> Job | None:
        """Put a job in line. Returns the job whose place it took, which is refused by then.

        Raises:
            Busy: `QUEUE` jobs wait already. Whatever `close` was given, once the lanes are closed.
        """
        with self.change:
            if self._closed is not None:
                raise self._closed
            mine = [] if job.session is None else self._of(job.session)
            replaced = min(mine, key=lambda other: other.asked) if len(mine) >= PER_SESSION else None
            if replaced is not None:
                self._lane(replaced).remove(replaced)
            elif len(self) >= QUEUE:
                raise Busy(f"busy: {len(self)} requests are waiting; try again in a moment.")
            self._lane(job).append(job)
            self.change.notify()
        if replaced is not None:
            replaced.refuse(Cancelled(REPLACED))
        return replaced

    def next(self, lane: str) -> Job | None:
        """Take the oldest job of a lane; it counts as running from here on, so `cancel` always sees it."""
        with self.change:
            if not self._waiting[lane]:
                return None
            job = self._waiting[lane].popleft()
            self.running.append(job)
            return job

    def done(self, job: Job) -> None:
        """The job runs no more."""
        with self.change:
            self.running.remove(job)

    def cancel(self, session: str, why: str) -> int:
        """Drop the waiting jobs of a session and stop its running ones. Returns how many."""
        with self.change:
            dropped = self._of(session)
            for job in dropped:
                self._lane(job).remove(job)
            running = [job for job in self.running if job.session == session]
            for job in running:
                job.why = why
                job.stop.set()
        for job in dropped:
            job.refuse(Cancelled(why))
        return len(dropped) + len(running)

    def close(self, error: Exception, stop: bool = False) -> None:
        """Refuse what waits and whatever comes later with `error`; `stop` also ends what runs."""
        with self.change:
            self._closed = error
            waiting = [job for lane in self._waiting.values() for job in lane]
            for lane in self._waiting.values():
                lane.clear()
            for job in self.running if stop else ():
                job.stop.set()
            self.change.notify_all()
        for job in waiting:
            job.refuse(error)

    def _lane(self, job: Job) -> deque[Job]:
        return self._waiting["student" if job.request.model == "student" else "teacher"]

    def _of(self, session: str) -> list[Job]:
        return [job for lane in self._waiting.values() for job in lane if job.session == session]
