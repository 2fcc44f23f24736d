"""Makes images of the models in a catalog, a batch at a time. Knows no gradio, no HTTP, and torch only in its worker.

One worker thread loads the models, warms them up and runs every batch: the state of CUDA graphs and of torch's
attention flags belongs to a thread or a process, so two threads must not run networks. Between two steps of a
long run (a teacher's) the worker serves short requests, for as long as that run itself has taken: nobody waits
seconds behind somebody else's teacher, and no teacher for ever behind students.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.batcher import STOPPED, Batcher, Job
from app.catalog import STUDENT, TEACHER, Entry, catalog
from app.metrics import Metrics
from app.pictures import Picture, Pictures
from app.request import Busy, Cancelled, Limits, Request, validate
from app.result import Result
from app.runner import Runner
from stepdistill.errors import UserError
from stepdistill.provenance import pipeline_sha256

if TYPE_CHECKING:
    from app.model import Model
    from app.models import Models

log = logging.getLogger("stepdistill.app")

# Seconds without a request until the worker does what can wait: nobody types or clicks then.
QUIET = 0.5
STOPPING = "the server is stopping; try again in a moment."


class Engine:
    """Serves students and a teacher.

    Args:
        students: a directory, several, or None for the embedded one; the first is called "student".
        teacher: a directory, None for the embedded one, False for none.
        options: of `app.models.Models`.
    """

    def __init__(
        self,
        students: str | Path | Sequence[str | Path] | None = None,
        teacher: str | Path | bool | None = None,
        **options: Any,
    ) -> None:
        many = students if isinstance(students, (list, tuple)) and students else [students]
        self.entries: dict[str, Entry] = catalog(many, teacher)
        # "new", "loading", "ready", "failed" or "closed": that of the first student.
        self.state = "new"
        self.problem: str | None = None
        self.metrics = Metrics()
        self.batcher = Batcher(self._cap)
        self.pictures = Pictures()
        self.models: Models | None = None
        self._options = options
        self._runner = Runner(self.batcher, self.metrics, self._serve, self._give_up)
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def limits(self) -> dict[str, Limits | None]:
        """What each model can do; None of one that has not been loaded."""
        return {name: entry.limits for name, entry in self.entries.items()}

    # Life ---------------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Begin loading in the worker thread and return at once."""
        if self._thread is None:
            self.state = "loading"
            self._thread = threading.Thread(target=self._work, name="stepdistill-worker", daemon=True)
            self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> Engine:
        """Wait until the first student answers.

        Raises UserError when it could not be loaded, Busy after `timeout` seconds.
        """
        if not self._ready.wait(timeout):
            raise Busy("the models are still loading; try again in a moment.")
        if self.state == "failed":
            raise UserError(self.problem or "the models could not be loaded.")
        return self

    def drain(self, seconds: float = 8.0) -> None:
        """Take no more requests from now on, and refuse what is not drawn in time. Returns at once."""
        self.batcher.refuse_from_now(Busy(STOPPING, 5))
        timer = threading.Timer(seconds, self.batcher.close, [Busy(STOPPING, 5), True])
        timer.daemon = True
        timer.start()

    def close(self, timeout: float = 10.0) -> bool:
        """Stop what runs at its next step, refuse what waits, and end the worker thread.

        Returns whether it ended in time: while a model is loading it cannot.
        """
        with self.batcher.change:
            self.state = "closed"
        self.batcher.close(Cancelled("the server is stopping."), stop=True)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._ready.set()
        return self._thread is None or not self._thread.is_alive()

    # Asking -------------------------------------------------------------------------------------------------

    def submit(
        self,
        asked: Request | Mapping[str, Any] | Sequence[Request],
        session: str | None = None,
        *,
        live: bool = False,
        number: int | None = None,
        picture: Picture | None = None,
    ) -> Any:
        """Check a request and put it in line: its `Job`, or a list of them for a list of requests.

        What comes before its model is loaded waits for it. `picture` is what the request's image names; without it the
        session must have uploaded one (`pictures`).

        Raises:
            Invalid: a field is out of range, or the session has no such picture. Busy: too many requests wait already.
            Cancelled: the session was stopped after this call. UserError: the model could not be loaded.
        """
        if self.state == "failed":
            raise UserError(self.problem or "the models could not be loaded.")
        several = isinstance(asked, (list, tuple))
        jobs = [
            Job(validate(one, self.limits), session, live, number) for one in (asked if several else [asked])
        ]
        for job in jobs:
            entry = self.entries[job.request.model]
            if entry.state == "failed":
                raise UserError(entry.problem or f"{entry.title} could not be loaded.")
            job.preview = live and bool(self._options.get("decoder"))
            if job.request.image:
                job.picture = picture or self.pictures.get(session, job.request.image)
        try:
            self.metrics.replaced(self.batcher.add(jobs))
        except Busy:
            self.metrics.count("busy")
            raise
        return jobs if several else jobs[0]

    def full(self) -> Busy | None:
        """What a further request is refused with, before anybody reads it; None where there is room."""
        busy = self.batcher.full()
        if busy is not None:
            self.metrics.count("busy")
        return busy

    def generate(
        self,
        asked: Request | Mapping[str, Any],
        session: str | None = None,
        timeout: float | None = None,
        picture: Picture | None = None,
    ) -> Result:
        """`submit` one request and wait for its image."""
        return self.submit(asked, session, picture=picture).future.result(timeout)

    def cancel(self, session: str | None, why: str = STOPPED, through: int | None = None) -> int:
        """Drop the waiting requests of a session and stop its running ones at the next step.

        through: the number of its last request that is meant. Returns how many were ended.
        """
        return 0 if session is None else self.batcher.cancel(session, why, through)

    def load(self, name: str) -> None:
        """Load a model of the catalog, also one that failed before, as soon as the worker is free."""
        entry = self.entries[name]
        if entry.state in ("idle", "failed"):
            with self.batcher.change:
                entry.state, entry.problem = "loading", None
                self.batcher.change.notify()

    def report(self) -> dict[str, Any]:
        """What is being served and how: models, device, dtype, attention in effect, threads, counts.

        JSON values only.
        """
        about: dict[str, Any] = {"status": self.state}
        if self.problem:
            about["problem"] = self.problem
        first = self.entries[STUDENT]
        about |= {key: first.about[key] for key in ("device", "device_name", "dtype", "attention", "threads")
                  if key in first.about}  # fmt: skip
        about["models"] = {name: entry.state for name, entry in self.entries.items()}
        return about | {"queue": len(self.batcher), "counts": self.metrics.counts()}

    # The worker thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        first = self.entries[STUDENT]
        first.state = "loading"
        try:
            from app.models import Models

            self.models = Models(**self._options)
        except UserError as error:
            self._give_up(str(error))
            return
        if self._load(first) is None:
            self._give_up(first.problem or "")
            return
        if TEACHER in self.entries:
            self.load(TEACHER)
        with self.batcher.change:
            if self.state == "loading":
                self.state = "ready"
        self._ready.set()
        more = True
        while self.state == "ready":
            batch = self.batcher.take()
            if batch:
                self._serve(batch)
                more = True
            elif self._rest(more):
                more = self._idle_work()

    def _rest(self, more: bool) -> bool:
        """Wait for requests. Whether nobody came for `QUIET` seconds, where there is `more` to do meanwhile."""
        with self.batcher.change:
            if self.state == "ready" and not len(self.batcher):
                self.batcher.change.wait(QUIET if more or self._wanted() else None)
            return not len(self.batcher)

    def _wanted(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.state == "loading"]

    def _idle_work(self) -> bool:
        """What is done while nobody waits: the next model, the next size of a batch, the next hash."""
        for entry in self._wanted():
            self._load(entry)
            return True
        for model in self.models.loaded.values():
            if "sha256" not in model.entry.about:
                model.entry.about["sha256"] = pipeline_sha256(model.entry.path)
                return True
            if model.make_faster():
                return True
        return False

    def _load(self, entry: Entry) -> Model | None:
        """The model of an entry, loaded where it is not; None where it cannot be, and then the others still serve."""
        try:
            model = self.models.load(entry)
            entry.state, entry.problem = "ready", None
            return model
        except UserError as error:
            entry.problem = str(error)
        except Exception as error:
            log.exception("loading %s failed", entry.id)
            entry.problem = (
                f"{entry.title} could not be loaded ({type(error).__name__}); the log has the details."
            )
        entry.state = "failed"
        problem = UserError(entry.problem)
        self.batcher.drop(problem, lambda job: job.request.model == entry.id)
        return None

    def _give_up(self, problem: str) -> None:
        self.problem, self.state = problem, "failed"
        self.batcher.close(UserError(problem))
        self._ready.set()

    # A batch ------------------------------------------------------------------------------------------------

    def _cap(self, key: tuple) -> int:
        """The most images of a key in one batch."""
        model = self.models.loaded.get(key[0]) if self.models is not None else None
        return 1 if model is None else self._runner.cap(model)

    def _serve(self, batch: list[Job]) -> None:
        """Run a batch and settle its futures, whatever happens; nothing escapes into the worker's loop."""
        entry = self.entries[batch[0].request.model]
        model = self._load(entry)
        try:
            jobs = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if model is not None:
                self._runner.run(model, jobs)
            for job in jobs if model is None else ():
                job.future.set_exception(UserError(entry.problem or ""))
        finally:
            self.batcher.done(batch)
