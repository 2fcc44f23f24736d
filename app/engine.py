"""Loads a student and its teacher and makes images, one network call at a time. Knows no gradio and no HTTP.

One worker thread loads the models, warms them up and runs every request: the state of CUDA graphs and of
torch's attention flags belongs to a thread or a process, so two threads must not run networks. There are two
lanes. Students are short and go first; a teacher's run of many steps looks into the student lane after each
step, so nobody waits seconds behind somebody else's teacher (the time given away is not counted as the
teacher's).

A session (a browser tab) has at most `PER_SESSION` requests waiting; a further one takes the place of its
oldest. All sessions together have at most `QUEUE` waiting; beyond that a request is refused at once.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.schema import Busy, Cancelled, Limits, NumericalFailure, Request, Result, Shot, validate
from stepdistill import assets
from stepdistill.errors import UserError

log = logging.getLogger("stepdistill.app")

QUEUE = 64
STOPPED = "stopped."
REPLACED = "a newer request took the place of this one."
PER_SESSION = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class Job:
    """A request on its way.

    `future` gives the `Result`; `cancel` drops it from the queue or stops it at its next step.
    """

    request: Request
    session: str | None
    future: Future = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)
    progress: tuple[int, int] = (0, 0)
    asked: float = field(default_factory=time.perf_counter)
    why: str = STOPPED  # what a cancelled request is told
    lent: float = 0.0  # seconds of this run in which requests of the other lane were served

    def cancel(self) -> None:
        self.stop.set()


class Engine:
    """Serves a student and optionally its teacher.

    Args:
        student, teacher: directories; None is the embedded asset. `teacher=False` serves the student alone.
        device: "auto" is CUDA where there is one. dtype: "auto" is float16 on CUDA and float32 elsewhere.
        attention: a name of `stepdistill.attention.BACKENDS`; one that cannot run fails the start.
        threads: of torch on the CPU; None leaves torch's own choice.
        load: (path, device=, dtype=) -> Sampler; tests hand in their own.
    """

    def __init__(
        self,
        student: str | Path | None = None,
        teacher: str | Path | bool | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        threads: int | None = None,
        load: Callable[..., Any] | None = None,
    ) -> None:
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        name = ("float16" if self.device.startswith("cuda") else "float32") if dtype == "auto" else dtype
        if name not in DTYPES:
            raise UserError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device={self.device} needs CUDA and this torch finds none; use --device cpu.")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}.") from None
        asked = {"student": student, "teacher": teacher}
        self._paths = {
            model: Path(assets.path(model) if path in (None, True) else path)
            for model, path in asked.items()
            if path is not False
        }
        self.dtype_name, self.dtype = name, DTYPES[name]
        self._attention = attention
        self._threads = threads
        self._load = load
        self._samplers: dict[str, Any] = {}
        self._watch: dict[str, _Finite] = {}
        self._reports: dict[str, Any] = {}

        self.limits: Limits | None = None
        self.state = "new"  # new, loading, ready, failed, closed
        self.problem: str | None = None
        self.counts: Counter[str] = Counter()
        self._ready = threading.Event()
        self._change = threading.Condition()
        self._lanes: dict[str, deque[Job]] = {"student": deque(), "teacher": deque()}
        self._running: list[Job] = []
        self._thread: threading.Thread | None = None

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
        with self._change:
            self.state = "closed"
            waiting = [job for lane in self._lanes.values() for job in lane]
            for lane in self._lanes.values():
                lane.clear()
            for job in self._running:
                job.stop.set()
            self._change.notify_all()
        for job in waiting:
            _refuse(job, Cancelled("the server is stopping."))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._ready.set()

    # Asking -------------------------------------------------------------------------------------------------

    def submit(self, asked: Request | Mapping[str, Any], session: str | None = None) -> Job:
        """Check a request and put it in line.

        Raises:
            Invalid: a field is out of range. Busy: the models are loading, or `QUEUE` requests wait already.
        """
        if self.state == "failed":
            raise UserError(self.problem or "the models could not be loaded.")
        if self.state != "ready" or self.limits is None:
            raise Busy("the models are still loading; try again in a moment.")
        job = Job(validate(asked, self.limits), session)
        replaced = None
        with self._change:
            mine = [
                j
                for lane in self._lanes.values()
                for j in lane
                if session is not None and j.session == session
            ]
            if len(mine) >= PER_SESSION:
                replaced = min(mine, key=lambda j: j.asked)
                self._lane(replaced).remove(replaced)
            elif self.waiting >= QUEUE:
                self.counts["busy"] += 1
                raise Busy(f"busy: {self.waiting} requests are waiting; try again in a moment.")
            self._lane(job).append(job)
            self._change.notify()
        if replaced is not None:
            self.counts["replaced"] += 1
            _refuse(replaced, Cancelled(REPLACED))
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
        if session is None:
            return 0
        with self._change:
            dropped = [job for lane in self._lanes.values() for job in lane if job.session == session]
            for job in dropped:
                self._lane(job).remove(job)
            running = [job for job in self._running if job.session == session]
            for job in running:
                job.why = why
                job.stop.set()
        for job in dropped:
            _refuse(job, Cancelled(why))
        return len(dropped) + len(running)

    def _lane(self, job: Job) -> deque[Job]:
        return self._lanes["student" if job.request.model == "student" else "teacher"]

    @property
    def directories(self) -> list[Path]:
        """Where the served models lie."""
        return list(self._paths.values())

    @property
    def waiting(self) -> int:
        """How many requests wait in both lanes."""
        return sum(len(lane) for lane in self._lanes.values())

    def report(self) -> dict[str, Any]:
        """What is being served and how: names, device, dtype, attention in effect, threads, counts.

        JSON values only.
        """
        about: dict[str, Any] = {"status": self.state, "device": self.device, "dtype": self.dtype_name}
        if self.problem:
            about["problem"] = self.problem
        if self.limits is None:
            return about
        about |= {
            "student": self.limits.student,
            "teacher": self.limits.teacher,
            "steps": list(self.limits.steps),
            "size": "{1}x{0}".format(*self.limits.resolution),
            "device_name": torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads() if self._threads is None else self._threads,
            "queue": self.waiting,
            "counts": dict(self.counts),
        }
        for model, chosen in self._reports.items():
            prefix = "" if model == "student" else "teacher_"
            about[f"{prefix}attention"] = str(chosen).removeprefix("attention: ")
            about[f"{prefix}attention_why"] = chosen.why
            about[f"{model}_parameters"] = dict(self._samplers[model].parameters)
        return about

    # The worker thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._start_models()
        except UserError as error:
            self._fail(str(error))
            return
        except Exception as error:
            log.exception("loading failed")
            self._fail(f"the models could not be loaded ({type(error).__name__}); the log has the details.")
            return
        with self._change:
            if self.state == "loading":
                self.state = "ready"
        self._ready.set()
        while True:
            with self._change:
                while self.state == "ready" and not self.waiting:
                    self._change.wait()
                if self.state != "ready":
                    return
                job = self._next("student") or self._next("teacher")
            self._serve(job)

    def _fail(self, problem: str) -> None:
        with self._change:
            self.problem, self.state = problem, "failed"
            waiting = [job for lane in self._lanes.values() for job in lane]
            for lane in self._lanes.values():
                lane.clear()
        for job in waiting:
            _refuse(job, UserError(problem))
        self._ready.set()

    def _next(self, lane: str) -> Job | None:
        """Take the oldest job of a lane; the caller holds the lock, so `cancel` sees it waiting or
        running.
        """
        if not self._lanes[lane]:
            return None
        job = self._lanes[lane].popleft()
        self._running.append(job)
        return job

    def _start_models(self) -> None:
        # Before anything of torch computes: the pool's size is read once per thread.
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        from stepdistill.attention import choose

        _quiet()
        load = self._load
        if load is None:
            from stepdistill import load
        for model, path in self._paths.items():
            sampler = load(path, device=self.device, dtype=self.dtype)
            self._samplers[model] = sampler
            self._reports[model] = choose(sampler.pipeline, self._attention)
            if self.device == "cpu":
                sampler.trace()  # half of a small network's time there is Python's
            self._watch[model] = _Finite(sampler)
        self.limits = self._read_limits()
        for steps in self.limits.steps:
            self._shoot("student", Request(self._any_prompt(), steps=steps, seed=0))
        if self.limits.teacher is not None:
            self._shoot("teacher", Request(self._any_prompt(), steps=2, seed=0))

    def _read_limits(self) -> Limits:
        student, teacher = self._samplers["student"], self._samplers.get("teacher")
        if teacher is not None and tuple(teacher.resolution) != tuple(student.resolution):
            raise UserError(
                f"--teacher makes {teacher.resolution} images, --student {student.resolution}; give a pair."
            )
        return Limits(
            steps=tuple(student.steps or sorted({1, 2, 4, 8, student.default_steps})),
            default_steps=student.default_steps,
            teacher_steps=teacher.default_steps if teacher else 50,
            guidance_free=student.guidance_free,
            student_guidance=student.default_guidance,
            teacher_guidance=teacher.default_guidance if teacher else 1.0,
            resolution=tuple(student.resolution),
            conditions=student.conditions,
            class_names=tuple(student.class_names) if student.class_names else None,
            student=student.name,
            teacher=teacher.name if teacher else None,
        )

    def _any_prompt(self) -> str:
        names = self.limits.class_names
        return (
            names[0]
            if self.limits.conditions == "class" and names
            else "a large red circle on a blue background"
        )

    def _serve(self, job: Job) -> None:
        """Run one job and settle its future, whatever happens; nothing escapes into the worker's loop."""
        if not job.future.set_running_or_notify_cancel():
            self._running.remove(job)
            return
        queued = time.perf_counter() - job.asked
        wanted = ("student", "teacher") if job.request.model == "both" else (job.request.model,)
        try:
            shots = {model: self._shoot(model, job.request, job) for model in wanted}
            self.counts["images"] += len(shots)
            job.future.set_result(Result(job.request, shots, queued, self.about()))
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
            if "CUDA error" in str(error):  # such an error sticks to the process: every later call fails too
                self._fail("the GPU failed; start the server again.")
        finally:
            self._running.remove(job)

    def about(self) -> dict[str, Any]:
        """The short form of `report` that is kept inside image files."""
        keys = ("device_name", "dtype", "attention", "threads")
        report = self.report()
        return {key: report[key] for key in keys if key in report}

    def _shoot(self, model: str, request: Request, job: Job | None = None) -> Shot:
        sampler, watch = self._samplers[model], self._watch[model]
        is_student = model == "student"
        if is_student:
            steps = request.steps or self.limits.default_steps
        else:
            steps = request.steps if request.model == "teacher" or job is None else None
        free = sampler.guidance_free
        guidance = None if free else request.guidance_scale
        names = self.limits.class_names
        prompt: Any = request.prompt
        if self.limits.conditions == "class" and names:
            prompt = names.index(prompt)
        spent: dict[str, float] = {}
        lent_before = job.lent if job else 0.0

        def on_step(done: int, total: int) -> None:
            if job is None:
                return
            job.progress = (done, total)
            if job.stop.is_set():
                raise Cancelled(job.why)
            if not is_student:
                self._give_way(job)

        if job is not None and job.stop.is_set():
            raise Cancelled(job.why)
        watch.reset()
        images = sampler(
            [prompt],
            [request.seed],
            steps=steps,
            guidance_scale=guidance,
            negative_prompts=[request.negative_prompt] if request.negative_prompt and not free else None,
            chunk=1,
            timings=spent,
            on_step=on_step,
        )
        if not watch.fine():
            raise NumericalFailure(
                f"{sampler.name} gave NaN or infinite values in {self.dtype_name}; try --dtype float32."
            )
        lent = (job.lent if job else 0.0) - lent_before
        return Shot(
            model=model,
            name=sampler.name,
            image=np.ascontiguousarray(images[0].permute(1, 2, 0).cpu().numpy()),
            steps=steps or sampler.default_steps,
            guidance_scale=float(sampler.default_guidance if guidance is None else guidance),
            text=spent.get("text", 0.0),
            denoise=max(0.0, spent.get("denoise", 0.0) - lent),
            decode=spent.get("decode", 0.0),
        )

    def _give_way(self, job: Job) -> None:
        """Between two steps of a teacher: serve the students that wait.

        The networks are different objects.
        """
        began = time.perf_counter()
        served = 0
        while served < QUEUE:
            with self._change:
                short = self._next("student")
            if short is None:
                break
            self._serve(short)
            served += 1
        if served:
            job.lent += time.perf_counter() - began


def _quiet() -> None:
    """No progress bars and no upgrade advice of the libraries on the console of a server."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def _refuse(job: Job, error: Exception) -> None:
    job.stop.set()
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)


class _Finite:
    """Watches the outputs of a sampler's networks for NaN and infinity.

    The sampler returns uint8, where NaN has become black; so each network's output is looked at. The answer
    stays on the device until the image is there: asking after every step would stop the GPU each time.
    """

    def __init__(self, sampler: Any) -> None:
        self._stack = ExitStack()
        self._bad: torch.Tensor | None = None
        pipeline = sampler.pipeline
        for network in (sampler.denoiser.network, getattr(pipeline, "text_encoder", None)):
            if isinstance(network, torch.nn.Module):
                self._stack.callback(network.register_forward_hook(self._look).remove)
        decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
        if isinstance(decoder, torch.nn.Module):
            self._stack.callback(decoder.register_forward_hook(self._look).remove)

    def reset(self) -> None:
        self._bad = None

    def fine(self) -> bool:
        """Whether everything since `reset` was finite."""
        return self._bad is None or not bool(self._bad)

    def _look(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) or hasattr(output, "to_tuple") else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            bad = ~torch.isfinite(first).all()
            self._bad = bad if self._bad is None else self._bad | bad
