"""Requests on their way to the worker: who goes next, and with whom.

The next batch is made of waiting requests with one `key` (model, steps, guidance, strength), so that one call of the
networks serves several users; nobody is waited for. Turns are fair: the first request of every session comes
before anybody's second. Requests of many steps (a teacher's) wait in a lane of their own, behind those of
few; one that has waited `PATIENCE` seconds goes first.

Bounded: a session has at most `PER_SESSION` requests waiting, where a further one takes the place of its
oldest, and a request is refused at once where the wait would be longer than `LONGEST_WAIT`. No torch here.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.request import Busy, Cancelled, Request

if TYPE_CHECKING:
    from app.pictures import Picture

# Steps up to which a request counts as short.
SHORT = 8
QUEUE = 1024
PER_SESSION = 16
PATIENCE = 2.0
# Seconds.
LONGEST_WAIT = 30.0
# Sessions whose last Stop is remembered.
REMEMBERED = 4096
STOPPED = "stopped."
REPLACED = "a newer request took the place of this one."


@dataclass(eq=False)
class Job:
    """A request on its way.

    `future` gives the `Result`; `cancel` drops it from the queue or stops it at its next step.

    Attributes:
        session: whose it is; None is a session of its own.
        live: drawn while somebody types: a newer live one of the session takes its place.
        number: counts the requests of a session, so that a Stop ends those before it and none after.
        picture: what its image names.
        preview: decoded by the tiny decoder.
        progress: steps done and in all.
        why: what the client is answered when the job is cancelled.
        asked, began: when it came and when its run did, by the clock.
        lent: seconds of its run in which others were served.
    """

    request: Request
    session: str | None = None
    live: bool = False
    number: int | None = None
    future: Future = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)
    picture: Picture | None = None
    preview: bool = False
    progress: tuple[int, int] = (0, 0)
    asked: float = 0.0
    began: float = 0.0
    why: str = STOPPED
    lent: float = 0.0

    @property
    def key(self) -> tuple:
        """What requests of one batch have in common."""
        r = self.request
        return (
            r.model,
            r.steps,
            r.guidance_scale,
            bool(r.negative_prompt),
            bool(r.image),
            r.strength,
            self.preview,
        )

    @property
    def short(self) -> bool:
        """Of few steps; of a model that is not loaded the steps may be unknown, and none is many."""
        return (self.request.steps or (50 if self.request.model == "teacher" else 1)) <= SHORT

    def cancel(self, why: str = STOPPED) -> None:
        self.why = why
        self.stop.set()

    def refuse(self, error: Exception) -> None:
        """Settle the future of a job that will not run."""
        self.stop.set()
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Batcher:
    """The jobs that wait and those that run. Safe to use from any thread.

    `change` is notified whenever a job is added or the batcher is closed.

    Args:
        cap: the most jobs of a key that one batch takes.
        clock: seconds.
    """

    def __init__(
        self, cap: Callable[[tuple], int] = lambda key: 1, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.change = threading.Condition()
        self.running: list[Job] = []
        self._waiting: list[Job] = []
        self._cap, self._clock = cap, clock
        self._closed: Exception | None = None
        self._stops: OrderedDict[str, int] = OrderedDict()
        # Seconds of the device that an image took, by model and steps.
        self._cost: dict[tuple, float] = {}

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    # Coming -------------------------------------------------------------------------------------------------

    def add(self, jobs: list[Job]) -> int:
        """Put the jobs of one call in line. Returns how many older ones of their session they replaced.

        Raises:
            Busy: the wait would be too long. Cancelled: the session was stopped after the call was made.
            Whatever `close` was given, once the batcher is closed.
        """
        with self.change:
            if self._closed is not None:
                raise self._closed
            first = jobs[0]
            if first.number is not None and first.number <= self._stops.get(first.session or "", -1):
                raise Cancelled(STOPPED)
            replaced = self._replaced(first, len(jobs))
            if not replaced and (busy := self.full(len(jobs))) is not None:
                raise busy
            for job in replaced:
                self._waiting.remove(job)
            for job in jobs:
                job.asked = self._clock()
            self._waiting += jobs
            self.change.notify()
        for job in replaced:
            job.refuse(Cancelled(REPLACED))
        return len(replaced)

    def _replaced(self, first: Job, count: int) -> list[Job]:
        if first.session is None:
            return []
        mine = [job for job in self._waiting if job.session == first.session]
        stale = [job for job in mine if job.live] if first.live else []
        rest = [job for job in mine if job not in stale]
        return stale + rest[: max(0, len(rest) + count - PER_SESSION)]

    def full(self, count: int = 1) -> Busy | None:
        """What so many further images are refused with; None where there is room. For any thread, and cheap."""
        waiting = len(self._waiting)
        wait = self.wait()
        if waiting + count <= QUEUE and wait <= LONGEST_WAIT:
            return None
        after = min(60, max(1, math.ceil(wait - LONGEST_WAIT)))
        return Busy(f"busy: {waiting} images are waiting; try again in {after} s.", after)

    def wait(self) -> float:
        """Seconds until everything that waits has been drawn, by what images took so far."""
        kinds = Counter([(job.request.model, job.request.steps) for job in self._waiting])
        return sum(self._cost.get(kind, 0.0) * count for kind, count in kinds.items())

    def took(self, key: tuple, seconds: float, count: int) -> None:
        """Note what a batch took: the next estimate of a wait rests on it."""
        with self.change:
            each, before = seconds / count, self._cost.get(key[:2])
            self._cost[key[:2]] = each if before is None else 0.8 * before + 0.2 * each

    # Going --------------------------------------------------------------------------------------------------

    def take(self, short_only: bool = False) -> list[Job]:
        """The next batch, in the order of its turns; it counts as running from here on. [] where none waits."""
        with self.change:
            first = self._first(short_only)
            if first is None:
                return []
            cap = self._cap(first.key)
            same = [job for job in self._in_turn() if job.key == first.key and job is not first]
            batch = [first, *same[: cap - 1]]
            for job in batch:
                self._waiting.remove(job)
            self.running += batch
            return batch

    def _first(self, short_only: bool) -> Job | None:
        order = self._in_turn()
        short = next((job for job in order if job.short), None)
        if short_only:
            return short
        long = next((job for job in order if not job.short), None)
        if short is None or (long is not None and self._clock() - long.asked > PATIENCE):
            return long
        return short

    def _in_turn(self) -> list[Job]:
        """What waits, every session's first before anybody's second; what is drawn live comes a turn later."""
        seen: Counter[str | int] = Counter(job.session for job in self.running if job.session is not None)
        turns = []
        for at, job in enumerate(self._waiting):
            whose = id(job) if job.session is None else job.session
            turns.append((seen[whose] + job.live, at, job))
            seen[whose] += 1
        return [job for _, _, job in sorted(turns, key=lambda turn: turn[:2])]

    def done(self, jobs: Iterable[Job]) -> None:
        """The jobs run no more."""
        with self.change:
            for job in jobs:
                self.running.remove(job)

    # Ending -------------------------------------------------------------------------------------------------

    def cancel(self, session: str, why: str = STOPPED, through: int | None = None) -> int:
        """Drop the waiting jobs of a session and stop its running ones. Returns how many.

        through: the number of the last request to end; what comes later with such a number does not start.
        """

        def meant(job: Job) -> bool:
            return job.session == session and (through is None or job.number is None or job.number <= through)

        with self.change:
            if through is not None:
                self._stops[session] = max(through, self._stops.get(session, -1))
                self._stops.move_to_end(session)
                if len(self._stops) > REMEMBERED:
                    self._stops.popitem(last=False)
            dropped = [job for job in self._waiting if meant(job)]
            self._waiting = [job for job in self._waiting if job not in dropped]
            running = [job for job in self.running if meant(job)]
            for job in running:
                job.cancel(why)
        for job in dropped:
            job.refuse(Cancelled(why))
        return len(dropped) + len(running)

    def drop(self, error: Exception, of: Callable[[Job], bool] = lambda job: True) -> None:
        """Refuse those of what waits with `error`."""
        with self.change:
            dropped = [job for job in self._waiting if of(job)]
            self._waiting = [job for job in self._waiting if job not in dropped]
        for job in dropped:
            job.refuse(error)

    def refuse_from_now(self, error: Exception) -> None:
        """Refuse whatever comes later with `error`; what waits is still drawn."""
        with self.change:
            self._closed = error
            self.change.notify_all()

    def close(self, error: Exception, stop: bool = False) -> None:
        """Refuse what waits and whatever comes later with `error`; `stop` also ends what runs."""
        self.refuse_from_now(error)
        self.drop(error)
        with self.change:
            for job in self.running if stop else ():
                job.cancel(str(error))
