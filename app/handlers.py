"""What the page does: each handler asks the engine and says which parts change.

Checking happens in `app.request`, so a handler formats what comes back and no more.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from app import png, settings, words
from app.engine import Engine
from app.lanes import REPLACED, STOPPED, Job
from app.layout import EXAMPLES, Parts
from app.request import MAX_SEED, Cancelled, Request, validate
from app.result import Result
from stepdistill import scenes
from stepdistill.errors import UserError

# Images kept in a tab's gallery.
HISTORY = 24
OPTIONS = {"show_progress": "hidden", "api_visibility": "private"}


class Run:
    """One call of `make`, from its start to its end.

    The engine can end only what has been handed to it. Between the student and the teacher a call has nothing
    there, so whatever ends it is also noted here.
    """

    def __init__(self) -> None:
        self.ended: str | None = None

    def check(self) -> None:
        """Raise `Cancelled` where the run has been ended."""
        if self.ended is not None:
            raise Cancelled(self.ended)


class Handlers:
    """The handlers of one page. Every one that draws is an `async def`, so that none holds a thread."""

    def __init__(self, engine: Engine, parts: Parts) -> None:
        self.engine = engine
        self.parts = parts
        self._runs: dict[str | None, list[Run]] = {}

    def connect(self, page: gr.Blocks) -> None:
        """Tie every event of the page to its handler."""
        p = self.parts
        make = {
            "fn": self.make,
            "inputs": [p.prompt, p.steps, p.seed, p.fresh, p.alone, p.negative, p.guidance, p.past],
            "outputs": [
                p.teacher, p.student, p.teacher_head, p.student_head, p.verdict, p.seed, p.past, p.gallery, p.album,
            ],
            "trigger_mode": "multiple",
            **OPTIONS,
        }  # fmt: skip
        gr.on([p.go.click, p.prompt.submit], **make)
        for chip, text in zip(p.chips, EXAMPLES, strict=True):
            chip.click(lambda text=text: text, None, p.prompt, **OPTIONS).then(**make)
        p.surprise.click(_scene, None, p.prompt, **OPTIONS).then(**make)
        p.prompt.input(
            self.typed,
            [p.prompt, p.steps, p.seed, p.live],
            [p.student, p.student_head, p.verdict, p.teacher, p.teacher_head],
            trigger_mode="always_last",
            **OPTIONS,
        )
        p.stop.click(self.stop, None, None, **OPTIONS)
        p.dice.click(_roll, None, [p.seed, p.fresh], **OPTIONS)
        p.drop.upload(self.read, p.drop, [p.prompt, p.steps, p.seed, p.fresh, p.read_back], **OPTIONS)
        p.gallery.select(_recall, p.past, [p.prompt, p.steps, p.seed, p.fresh], **OPTIONS)
        page.unload(self.stop)
        changing = [p.status, p.footer, p.clock, p.steps, p.alone, p.teacher_card]
        changing += [p.advanced, p.negative, p.guidance, p.prompt]
        page.load(self.refresh, None, changing, **OPTIONS)
        p.clock.tick(self.refresh, None, changing, **OPTIONS)

    async def make(
        self,
        prompt: str,
        steps: int,
        seed: int,
        fresh: bool,
        alone: bool,
        negative: str,
        guidance: float | None,
        past: list,
        request: gr.Request,
    ) -> AsyncIterator[dict]:
        """Student first, shown at once; then the teacher from the same seed."""
        engine, p, session = self.engine, self.parts, request.session_hash
        self._end(session, REPLACED)
        alone = alone or engine.limits is None or engine.limits.teacher is None
        own = self._students_guidance(guidance)
        asked = Request(prompt, negative or "", -1 if fresh else seed, steps, guidance, "both")
        if alone:
            asked = replace(asked, model="student", guidance_scale=own)
        run, first = Run(), None
        self._runs.setdefault(session, []).append(run)
        try:
            if engine.limits is not None:
                asked = validate(asked, engine.limits)
            drawn = await _result(engine.submit(replace(asked, model="student", guidance_scale=own), session))
            run.check()
            first = drawn
            past = [*past, _entry(first, "student")][-HISTORY:]
            yield self._student(first, past, alone)
            if alone:
                return
            run.check()
            job = engine.submit(replace(asked, model="teacher", steps=None, seed=first.request.seed), session)
            future = asyncio.wrap_future(job.future)
            while not (await asyncio.wait({future}, timeout=0.25))[0]:
                yield self._progress(job)
            second = future.result()
            run.check()
            past = [*past, _entry(second, "teacher")][-HISTORY:]
            yield self._teacher(first, second, past)
        except Cancelled as stopped:
            # Where a newer request took its place, that one's handler owns the page.
            if first is None:
                # Of a generator that yields nothing Gradio empties every output.
                yield {p.student: gr.skip()}
            elif str(stopped) != REPLACED:
                yield {p.teacher: None, p.teacher_head: words.head("Teacher", "stopped")}
        except UserError as error:
            if first is not None:
                yield {p.teacher: None, p.teacher_head: words.head("Teacher", "failed")}
            raise gr.Error(str(error), duration=8, print_exception=False) from None
        finally:
            self._runs[session].remove(run)
            if not self._runs[session]:
                del self._runs[session]

    async def typed(self, prompt: str, steps: int, seed: int, live: bool, request: gr.Request) -> dict:
        """While typing: the student alone, the seed kept, and mistakes passed over (half a word is none)."""
        p, session, limits, ended = self.parts, request.session_hash, self.engine.limits, False
        if not live or limits is None:
            return {p.student: gr.skip()}
        try:
            asked = validate(Request(prompt, "", seed, steps), limits)
            # Otherwise the teacher of an earlier request would come to stand beside this student.
            ended = self._end(session, REPLACED)
            first = await _result(self.engine.submit(asked, session))
        except UserError as error:
            if ended and str(error) != REPLACED:
                return {p.teacher: None, p.teacher_head: words.head("Teacher", "stopped")}
            return {p.student: gr.skip()}
        return {
            p.student: _pil(first, "student"),
            p.student_head: words.head("Student", words.facts(first, "student")),
            p.verdict: words.verdict(first.shots),
            p.teacher: None,
            p.teacher_head: words.head("Teacher", ""),
        }

    def stop(self, request: gr.Request) -> None:
        """End what this tab has asked for: by its button, or by leaving."""
        self._end(request.session_hash, STOPPED)

    def _end(self, session: str | None, why: str) -> bool:
        """End everything of a tab, and say whether `make` was at work for it."""
        runs = list(self._runs.get(session, ()))
        for run in runs:
            run.ended = run.ended or why
        self.engine.cancel(session, why)
        return bool(runs)

    def read(self, data: bytes | None) -> tuple[Any, ...]:
        """Fill the form from a dropped PNG; what it says is checked like anything typed."""
        try:
            _, text = png.read_png(data or b"")
            if text is None:
                raise UserError("this PNG carries no settings; only images downloaded from this page do.")
            request = settings.from_settings(text, self.engine.limits)
        except UserError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from None
        said = f"{request.model}, {words.steps(request.steps)}, seed {request.seed}\n{request.prompt}"
        return *_fill(settings.settings(request)), gr.Textbox(said, visible=True)

    def refresh(self) -> dict:
        """Until the models answer: their state. Then, once, the form they allow."""
        p, engine, limits = self.parts, self.engine, self.engine.limits
        if engine.state != "ready" or limits is None:
            return {
                p.status: words.status(engine),
                p.footer: words.footer(engine),
                p.clock: gr.Timer(active=engine.state == "loading"),
            }
        classes = limits.class_names if limits.conditions == "class" else None
        guided = limits.teacher is not None and limits.teacher_guidance > 1
        return {
            p.status: words.status(engine),
            p.footer: words.footer(engine),
            p.clock: gr.Timer(active=False),
            p.steps: gr.Radio(list(limits.steps), value=limits.default_steps),
            p.alone: gr.Checkbox(visible=limits.teacher is not None),
            p.teacher_card: gr.Column(visible=limits.teacher is not None),
            p.advanced: gr.Accordion(visible=guided or not limits.guidance_free),
            p.negative: gr.Textbox(visible=not limits.guidance_free),
            p.guidance: gr.Slider(value=limits.teacher_guidance, visible=guided),
            p.prompt: gr.Textbox(value=classes[0], placeholder=", ".join(classes[:12]))
            if classes
            else gr.skip(),
        }

    def _students_guidance(self, guidance: float | None) -> float | None:
        """The guidance box is the teacher's; a guidance-free student has none."""
        return None if self.engine.limits is None or self.engine.limits.guidance_free else guidance

    # What `make` shows --------------------------------------------------------------------------------------

    def _student(self, first: Result, past: list, alone: bool) -> dict:
        p = self.parts
        return {
            p.student: _pil(first, "student"),
            p.student_head: words.head("Student", words.facts(first, "student")),
            p.seed: first.request.seed,
            p.verdict: words.verdict(first.shots),
            p.past: past,
            p.gallery: _gallery(past),
            p.album: gr.Column(visible=True),
            p.teacher: None if alone else gr.skip(),
            p.teacher_head: words.head("Teacher", "")
            if alone
            else words.head("Teacher", "waiting", stale=True),
        }

    def _progress(self, job: Job) -> dict:
        done, total = job.progress
        text = f"step {done} of {total}" if total else "waiting"
        return {self.parts.teacher_head: words.head("Teacher", text, done / max(total, 1), stale=True)}

    def _teacher(self, first: Result, second: Result, past: list) -> dict:
        p = self.parts
        return {
            p.teacher: _pil(second, "teacher"),
            p.teacher_head: words.head("Teacher", words.facts(second, "teacher")),
            p.verdict: words.verdict({**first.shots, **second.shots}),
            p.past: past,
            p.gallery: _gallery(past),
            p.album: gr.Column(visible=True),
        }


# Pieces -----------------------------------------------------------------------------------------------------


async def _result(job: Job) -> Result:
    try:
        return await asyncio.wrap_future(job.future)
    except asyncio.CancelledError:
        job.cancel()
        raise


def _pil(result: Result, model: str) -> Image.Image:
    image = Image.fromarray(result.shots[model].image)
    image.info[png.KEY] = json.dumps(result.settings(model))
    return image


def _entry(result: Result, model: str) -> dict[str, Any]:
    return {"image": _pil(result, model), "settings": result.settings(model)}


def _gallery(past: list[dict[str, Any]]) -> list[tuple[Image.Image, str]]:
    """The newest first, captioned S1 for one step of the student and T50 for fifty of the teacher."""
    newest = [(entry["image"], entry["settings"]) for entry in reversed(past)]
    return [(image, f"{values['model'][0].upper()}{values['steps']}") for image, values in newest]


def _recall(past: list[dict[str, Any]], event: gr.SelectData) -> Any:
    """The settings of the image that was clicked; none where it has left the gallery by now."""
    at = len(past) - 1 - event.index
    return _fill(past[at]["settings"]) if at >= 0 else (gr.skip(),) * 4


def _fill(values: dict[str, Any]) -> tuple[Any, ...]:
    """Prompt, steps, seed and the new-seed box from settings; the teacher's steps are not the student's."""
    chosen = values["steps"] if values["model"] == "student" else gr.skip()
    return values["prompt"], chosen, values["seed"], False


def _roll() -> tuple[int, bool]:
    return secrets.randbelow(MAX_SEED + 1), False


def _scene() -> str:
    return scenes.sample_scene(np.random.default_rng()).caption
