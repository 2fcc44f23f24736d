"""A batch on its way through the networks: who fails with it, who goes between its steps, and what it took."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from app.batcher import Batcher, Job
from app.metrics import Metrics
from app.request import Busy, Cancelled, validate
from app.result import Result
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from app.model import Model

log = logging.getLogger("stepdistill.app")


class Runner:
    """Runs batches in the worker's thread.

    Args:
        serve: runs another batch, between two steps of this one.
        give_up: ends all serving, where the device has failed.
    """

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        serve: Callable[[list[Job]], None],
        give_up: Callable[[str], None],
    ) -> None:
        self.batcher, self.metrics = batcher, metrics
        self._serve, self._give_up = serve, give_up
        # Of images at once, by model, since memory ran out.
        self._caps: dict[str, int] = {}

    def cap(self, model: Model) -> int:
        """The most images of a model in one batch."""
        largest = max(model.sizes)
        return min(largest, self._caps.get(model.entry.id, largest))

    def run(self, model: Model, jobs: list[Job]) -> None:
        """Draw jobs of one key and settle their futures."""
        self._draw(model, self._checked(model, jobs))

    def _checked(self, model: Model, jobs: list[Job]) -> list[Job]:
        """The jobs that may run. Those that came before their model was loaded are checked only now."""
        good = []
        for job in jobs:
            try:
                job.request = validate(job.request, {job.request.model: model.entry.limits})
                if job.stop.is_set():
                    raise Cancelled(job.why)
                good.append(job)
            except UserError as error:
                self._settle(job, error)
        return good

    def _draw(self, model: Model, jobs: list[Job]) -> None:
        """Draw jobs of one key; where it fails, each alone, so that it fails only whom it must."""
        if not jobs:
            return
        began = time.perf_counter()
        for job in jobs:
            job.began = began
        try:
            pictures = [job.picture for job in jobs] if jobs[0].picture is not None else None
            asked = [job.request for job in jobs]
            preview = jobs[0].preview and model.preview is not None
            images, spent = model.draw(asked, lambda i, n: self._on_step(jobs, i, n), pictures, preview)
        except Exception as error:
            if _out_of_memory(error) and len(jobs) > 1:
                self.metrics.count("out_of_memory")
                self._caps[model.entry.id] = len(jobs) // 2
                log.warning("out of memory with %d images at once; %d from now on", len(jobs), len(jobs) // 2)
                for part in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                    self._draw(model, part)
            elif len(jobs) > 1 and not isinstance(error, Cancelled):
                for job in jobs:
                    self._draw(model, [job])
            else:
                for job in jobs:
                    self._settle(job, error)
            return
        lent = jobs[0].lent
        spent["denoise"] = max(0.0, spent["denoise"] - lent)
        self.batcher.took(jobs[0].key, time.perf_counter() - began - lent, len(jobs))
        each = {name: value / len(jobs) for name, value in spent.items()}
        for job, image in zip(jobs, images, strict=True):
            if job.stop.is_set():
                self._settle(job, Cancelled(job.why))
                continue
            waited = began - job.asked
            about = self._about(model)
            result = Result(job.request, image, model.entry.title, each, waited, len(jobs), about, preview)
            self.metrics.drawn(result, time.perf_counter() - job.asked)
            job.future.set_result(result)

    def _on_step(self, jobs: list[Job], done: int, total: int) -> None:
        for job in jobs:
            job.progress = (done, total)
        if all(job.stop.is_set() for job in jobs):
            raise Cancelled(jobs[0].why)
        if not jobs[0].short and done < total:
            self._give_way(jobs)

    def _give_way(self, jobs: list[Job]) -> None:
        """Between two steps of a long run: serve short requests, for at most the time the run itself has had."""
        began = time.perf_counter()
        lent = jobs[0].lent
        own = began - jobs[0].began - lent
        while lent < own and (short := self.batcher.take(short_only=True)):
            self._serve(short)
            lent = jobs[0].lent + time.perf_counter() - began
        for job in jobs:
            job.lent = lent

    def _settle(self, job: Job, error: Exception) -> None:
        """Answer a job with an error: a UserError as it is, anything else by a number that the log has as well."""
        if isinstance(error, UserError):
            self.metrics.count(type(error).__name__.lower())
            job.future.set_exception(error)
        elif _out_of_memory(error):
            self.metrics.count("out_of_memory")
            job.future.set_exception(Busy("the device ran out of memory; try again in a moment."))
        else:
            # The caller gets a number to quote and never a path or a traceback; the log has both.
            number = secrets.token_hex(4)
            log.error("request %s failed", number, exc_info=error)
            self.metrics.count("failed")
            job.future.set_exception(
                UserError(f"the image could not be made; the log has the details under {number}.")
            )
            # Such an error sticks to the process: every later call fails too.
            if "CUDA error" in str(error):
                self._give_up("the GPU failed; start the server again.")

    def _about(self, model: Model) -> dict[str, Any]:
        """What is kept of a model inside image files."""
        keys = ("device_name", "dtype", "attention", "threads", "sha256")
        return {key: model.entry.about[key] for key in keys if key in model.entry.about}


def _out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "out of memory" in text
    )
