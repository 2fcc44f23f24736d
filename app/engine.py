"""Makes images of a student and its teacher, one network call at a time. Knows no gradio and no HTTP.

One worker thread loads the models, warms them up and runs every request: the state of CUDA graphs and of
torch's attention flags belongs to a thread or a process, so two threads must not run networks. Students are
short and go first; a teacher's run of many steps looks into the student lane after each step, so nobody waits
seconds behind somebody else's teacher (the time given away is not counted as the teacher's).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.lanes import QUEUE, STOPPED, Job, Lanes
from app.loading import Models
from app.request import Busy, Cancelled, Limits, Request, validate
from app.result import Result, Shot
from app.run import draw
from stepdistill.errors import UserError

log = logging.getLogger("stepdistill.app")


class Engine:
    """Serves what `Models(student, teacher, **options)` describes."""

    def __init__(
        self, student: str | Path | None = None, teacher: str | Path | bool | None = None, **options: Any
    ) -> None:
        self.models = Models(student, teacher, **options)
        # "new", "loading", "ready", "failed" or "closed".
        self.state = "new"
        self.problem: str | None = None
        self.counts: Counter[str] = Counter()
        self.lanes = Lanes()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def limits(self) -> Limits | None:
        """What the models can do; None while they load."""
        return self.models.limits

    # Life ---------------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Begin loading in the worker thread and return at once."""
        if self._thread is None:
            self.state = "loading"
            self._thread = threading.Thread(target=self._work, name="stepdistill-worker", daemon=True)
            self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> Engine:
        """Wait until the models answer.

        Raises UserError when they could not be loaded, Busy after `timeout` seconds.
        """
        if not self._ready.wait(timeout):
            raise Busy("the models are still loading; try again in a moment.")
        if self.state == "failed":
            raise UserError(self.problem or "the models could not be loaded.")
        return self

    def close(self, timeout: float = 10.0) -> None:
        """Stop what runs at its next step, refuse what waits, and end the worker thread."""
        with self.lanes.change:
            self.state = "closed"
        self.lanes.close(Cancelled("the server is stopping."), stop=True)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._ready.set()

    # Asking -------------------------------------------------------------------------------------------------

    def submit(self, asked: Request | Mapping[str, Any], session: str | None = None) -> Job:
        """Check a request and put it in line.

        Raises:
            Invalid: a field is out of range. Busy: the models are loading, or too many requests wait already.
        """
        if self.state == "failed":
            raise UserError(self.problem or "the models could not be loaded.")
        if self.state != "ready" or self.limits is None:
            raise Busy("the models are still loading; try again in a moment.")
        job = Job(validate(asked, self.limits), session)
        try:
            replaced = self.lanes.add(job)
        except Busy:
            self.counts["busy"] += 1
            raise
        self.counts["replaced"] += replaced is not None
        return job

    def generate(
        self, asked: Request | Mapping[str, Any], session: str | None = None, timeout: float | None = None
    ) -> Result:
        """`submit` and wait for the images."""
        return self.submit(asked, session).future.result(timeout)

    def cancel(self, session: str | None, why: str = STOPPED) -> int:
        """Drop the waiting requests of a session and stop its running one at the next step.

        Returns how many.
        """
        return 0 if session is None else self.lanes.cancel(session, why)

    def report(self) -> dict[str, Any]:
        """What is being served and how: names, device, dtype, attention in effect, threads, counts.

        JSON values only.
        """
        about = {"status": self.state, **self.models.report()}
        if self.problem:
            about["problem"] = self.problem
        if self.limits is not None:
            about |= {"queue": len(self.lanes), "counts": dict(self.counts)}
        return about

    # The worker thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self.models.load()
            self._warm_up()
        except UserError as error:
            self._fail(str(error))
            return
        except Exception as error:
            log.exception("loading failed")
            self._fail(f"the models could not be loaded ({type(error).__name__}); the log has the details.")
            return
        with self.lanes.change:
            if self.state == "loading":
                self.state = "ready"
        self._ready.set()
        while True:
            with self.lanes.change:
                while self.state == "ready" and not len(self.lanes):
                    self.lanes.change.wait()
                if self.state != "ready":
                    return
                job = self.lanes.next("student") or self.lanes.next("teacher")
            self._serve(job)

    def _fail(self, problem: str) -> None:
        self.problem, self.state = problem, "failed"
        self.lanes.close(UserError(problem))
        self._ready.set()

    def _warm_up(self) -> None:
        prompt = self.models.any_prompt()
        for steps in self.limits.steps:
            draw(self.models, "student", Request(prompt, seed=0), steps)
        if self.limits.teacher is not None:
            draw(self.models, "teacher", Request(prompt, seed=0), 2)

    def _serve(self, job: Job) -> None:
        """Run one job and settle its future, whatever happens; nothing escapes into the worker's loop."""
        if not job.future.set_running_or_notify_cancel():
            self.lanes.done(job)
            return
        queued = time.perf_counter() - job.asked
        wanted = ("student", "teacher") if job.request.model == "both" else (job.request.model,)
        try:
            shots = {model: self._shoot(model, job) for model in wanted}
            self.counts["images"] += len(shots)
            job.future.set_result(Result(job.request, shots, queued, self._about()))
        except UserError as error:
            self.counts[type(error).__name__.lower()] += 1
            job.future.set_exception(error)
        except torch.cuda.OutOfMemoryError:
            self.counts["out_of_memory"] += 1
            job.future.set_exception(Busy("the GPU ran out of memory; try again in a moment."))
        except Exception as error:
            # The caller gets a number to quote and never a path or a traceback; the log has both.
            number = secrets.token_hex(4)
            log.exception("request %s failed", number)
            self.counts["failed"] += 1
            job.future.set_exception(
                UserError(f"the image could not be made; the log has the details under {number}.")
            )
            # Such an error sticks to the process: every later call fails too.
            if "CUDA error" in str(error):
                self._fail("the GPU failed; start the server again.")
        finally:
            self.lanes.done(job)

    def _about(self) -> dict[str, Any]:
        """The short form of `report` that is kept inside image files."""
        keys = ("device_name", "dtype", "attention", "threads")
        report = self.models.report()
        return {key: report[key] for key in keys if key in report}

    def _shoot(self, model: str, job: Job) -> Shot:
        """One model's image of a job, with the time that was lent to others taken off."""
        lent_before = job.lent

        def on_step(done: int, total: int) -> None:
            job.progress = (done, total)
            if job.stop.is_set():
                raise Cancelled(job.why)
            if model == "teacher":
                self._give_way(job)

        if job.stop.is_set():
            raise Cancelled(job.why)
        # In a pair the steps asked for are the student's.
        steps = job.request.steps if model == job.request.model or model == "student" else None
        shot = draw(self.models, model, job.request, steps, on_step)
        return replace(shot, denoise=max(0.0, shot.denoise - (job.lent - lent_before)))

    def _give_way(self, job: Job) -> None:
        """Between two steps of a teacher: serve the students that wait.

        The networks are different objects.
        """
        began = time.perf_counter()
        served = 0
        while served < QUEUE and (short := self.lanes.next("student")) is not None:
            self._serve(short)
            served += 1
        if served:
            job.lent += time.perf_counter() - began
