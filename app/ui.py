"""The page: a prompt, the student's image beside the teacher's, and how long each took. Layout and wording
only.

Every handler asks the engine and formats what comes back; checking happens in `app.schema`. A prompt is never
put into `gr.HTML`, the one component that would run a script in it.
"""

from __future__ import annotations

import asyncio
import html
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from app import schema
from app.engine import REPLACED, Engine, Job
from app.page import Page
from stepdistill import scenes
from stepdistill.errors import UserError

HISTORY = 24  # images kept in a tab's gallery
EXAMPLES = (
    "a small red circle above a large blue square on a yellow background",
    "a large green star on a black background",
    "a large purple diamond left of a small white cross on a cyan background",
    "a small yellow triangle below a large red circle on a white background",
)


def look() -> dict[str, Any]:
    """Theme, styles and head of the page. System fonts: nothing is fetched from another host."""
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )
    return {"theme": theme, "css": (Path(__file__).parent / "page.css").read_text(), "head": _HEAD}


_HEAD = '<meta name="color-scheme" content="light dark">'


def build(engine: Engine) -> gr.Blocks:
    """The page of `engine`, which may still be loading."""
    with Page(
        title="stepdistill", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    ) as page:
        with gr.Row(elem_classes="top"):
            gr.HTML(
                "<h1>stepdistill</h1><p>Many diffusion steps, distilled into one to four.</p>",
                elem_classes="title",
            )
            status = gr.HTML(_status(engine), elem_classes="status")
        with gr.Row(elem_classes="ask"):
            prompt = gr.Textbox(
                value=EXAMPLES[0],
                placeholder="Describe an image and press Enter",
                show_label=False,
                label="Prompt",
                lines=1,
                max_lines=3,
                autofocus=True,
                container=False,
                scale=8,
                elem_id="prompt",
                max_length=schema.Limits.max_prompt,
            )
            go = gr.Button("Generate", variant="primary", scale=1, min_width=120, elem_id="go")
            stop = gr.Button("Stop", variant="secondary", scale=0, min_width=76, elem_id="stop")
        with gr.Row(elem_classes="chips"):
            chips = [gr.Button(text, size="sm", min_width=0, scale=0) for text in EXAMPLES]
            surprise = gr.Button("Surprise me", size="sm", min_width=0, scale=0, elem_classes="surprise")

        with gr.Row(elem_classes="stage"):
            with gr.Column(scale=0, min_width=264, elem_classes="controls"):
                steps = gr.Radio([1], value=1, label="Student steps", elem_classes="steps")
                with gr.Row(elem_classes="seed"):
                    seed = gr.Number(
                        value=0,
                        precision=0,
                        label="Seed",
                        minimum=0,
                        maximum=schema.MAX_SEED,
                        scale=3,
                        min_width=90,
                    )
                    dice = gr.Button("Draw a seed", scale=0, min_width=44, elem_id="dice")
                fresh = gr.Checkbox(value=True, label="New seed every time")
                alone = gr.Checkbox(value=False, label="Student only (no waiting)")
                live = gr.Checkbox(value=False, label="Live: draw while I type")
                with gr.Accordion("Advanced", open=False):
                    negative = gr.Textbox(
                        label="Negative prompt",
                        lines=2,
                        max_length=schema.Limits.max_prompt,
                        info="Needs a model with guidance; a guidance-free student refuses it.",
                    )
                    guidance = gr.Slider(1, 15, value=7.5, step=0.5, label="Teacher guidance", visible=False)
                with gr.Accordion("Settings from an image", open=False):
                    drop = gr.File(
                        label="A PNG downloaded here", file_types=[".png"], type="binary", height=110
                    )
                    told = gr.Textbox(label="Read back", interactive=False, visible=False, lines=3)
            with gr.Column(scale=1, elem_classes="outputs"):
                with gr.Row(elem_classes="pair"):
                    with gr.Column(min_width=150, elem_classes="card") as teacher_card:
                        teacher_head = gr.HTML(_head("Teacher", ""))
                        teacher = _picture("Teacher image")
                    with gr.Column(min_width=150, elem_classes="card"):
                        student_head = gr.HTML(_head("Student", ""))
                        student = _picture("Student image")
                verdict = gr.HTML(_hint(), elem_classes="verdict")
                with gr.Column(visible=False, elem_classes="album") as album:
                    gr.HTML('<p class="past">This session. Click an image to get its settings back.</p>')
                    gallery = gr.Gallery(
                        label="This session",
                        show_label=False,
                        format="png",
                        allow_preview=False,
                        buttons=[],
                        elem_classes="history",
                    )
        footer = gr.HTML(_footer(engine), elem_classes="report")
        past = gr.State([], time_to_live=3600)
        clock = gr.Timer(1.0)

        shown = [teacher, student, teacher_head, student_head, verdict, seed, past, gallery, album]
        form = [prompt, steps, seed, fresh, alone, negative, guidance, past]

        async def make(
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
            session = request.session_hash
            engine.cancel(session, REPLACED)
            alone = alone or engine.limits is None or engine.limits.teacher is None
            students = _students(engine, guidance)
            seed = -1 if fresh else seed
            asked = schema.Request(prompt, negative or "", seed, steps, guidance, "both")
            if alone:
                asked = replace(asked, model="student", guidance_scale=students)
            try:
                if engine.limits is not None:
                    asked = schema.validate(asked, engine.limits)
                one = replace(asked, model="student", guidance_scale=students)
                first = await _result(engine.submit(one, session))
                past = [*past, _entry(first, "student")][-HISTORY:]
                yield {
                    student: _pil(first, "student"),
                    student_head: _head("Student", _facts(first, "student")),
                    seed_box: first.request.seed,
                    verdict: _verdict(first.shots),
                    past_state: past,
                    gallery: _gallery(past),
                    album: gr.Column(visible=True),
                    teacher: None if alone else gr.skip(),
                    teacher_head: _head("Teacher", "" if alone else "waiting"),
                }
                if alone:
                    return
                two = replace(asked, model="teacher", steps=None, seed=first.request.seed)
                job = engine.submit(two, session)
                future = asyncio.wrap_future(job.future)
                while not (await asyncio.wait({future}, timeout=0.25))[0]:
                    done, total = job.progress
                    yield {
                        teacher_head: _head(
                            "Teacher", f"step {done} of {total}" if total else "waiting", done / max(total, 1)
                        ),
                    }
                second = future.result()
                shots = {**first.shots, **second.shots}
                past = [*past, _entry(second, "teacher")][-HISTORY:]
                yield {
                    teacher: _pil(second, "teacher"),
                    teacher_head: _head("Teacher", _facts(second, "teacher")),
                    verdict: _verdict(shots),
                    past_state: past,
                    gallery: _gallery(past),
                    album: gr.Column(visible=True),
                }
            except schema.Cancelled as stopped:
                if str(stopped) != REPLACED:  # then the newer request's handler owns the page
                    yield {teacher_head: _head("Teacher", "stopped")}
            except UserError as error:
                raise gr.Error(str(error), duration=8, print_exception=False) from None

        # Inside `make` the names of the form's components are its values.
        seed_box, past_state = seed, past
        options = {"show_progress": "hidden", "api_visibility": "private"}
        run = {"fn": make, "inputs": form, "outputs": shown, "trigger_mode": "multiple", **options}
        gr.on([go.click, prompt.submit], **run)
        for chip, text in zip(chips, EXAMPLES, strict=True):
            chip.click(lambda text=text: text, None, prompt, **options).then(**run)
        surprise.click(_scene, None, prompt, **options).then(**run)

        async def typed(prompt: str, steps: int, seed: int, live: bool, request: gr.Request) -> dict:
            """While typing: the student alone, the seed kept, and mistakes passed over (half a word is no
            mistake).
            """
            if not live:
                return {student: gr.skip()}
            try:
                first = await _result(
                    engine.submit(schema.Request(prompt, "", seed, steps), request.session_hash)
                )
            except UserError:
                return {student: gr.skip()}
            return {
                student: _pil(first, "student"),
                student_head: _head("Student", _facts(first, "student")),
                verdict: _verdict(first.shots),
                teacher: None,
                teacher_head: _head("Teacher", ""),
            }

        prompt.input(
            typed,
            [prompt, steps, seed, live],
            [student, student_head, verdict, teacher, teacher_head],
            trigger_mode="always_last",
            **options,
        )

        def halt(request: gr.Request) -> None:
            engine.cancel(request.session_hash)

        stop.click(halt, None, None, **options)
        dice.click(lambda: (secrets.randbelow(schema.MAX_SEED + 1), False), None, [seed, fresh], **options)
        drop.upload(lambda data: _read(data, engine), drop, [prompt, steps, seed, fresh, told], **options)
        gallery.select(_recall, past, [prompt, steps, seed, fresh], **options)

        def left(request: gr.Request) -> None:
            engine.cancel(request.session_hash)

        page.unload(left)

        def refresh() -> dict:
            """Until the models answer: their state. Then, once, the form they allow."""
            limits = engine.limits
            if engine.state != "ready" or limits is None:
                return {
                    status: _status(engine),
                    footer: _footer(engine),
                    clock: gr.Timer(active=engine.state == "loading"),
                }
            classes = limits.class_names if limits.conditions == "class" else None
            return {
                status: _status(engine),
                footer: _footer(engine),
                clock: gr.Timer(active=False),
                steps: gr.Radio(list(limits.steps), value=limits.default_steps),
                alone: gr.Checkbox(visible=limits.teacher is not None),
                teacher_card: gr.Column(visible=limits.teacher is not None),
                guidance: gr.Slider(
                    value=limits.teacher_guidance,
                    visible=limits.teacher is not None and limits.teacher_guidance > 1,
                ),
                prompt: gr.Textbox(value=classes[0], placeholder=", ".join(classes[:12]))
                if classes
                else gr.skip(),
            }

        fresh_parts = [status, footer, clock, steps, alone, teacher_card, guidance, prompt]
        page.load(refresh, None, fresh_parts, **options)
        clock.tick(refresh, None, fresh_parts, **options)
    return page


# Pieces -----------------------------------------------------------------------------------------------------


def _picture(label: str) -> gr.Image:
    # PNG and not Gradio's default lossy WebP: the download must be the pixels, with the settings inside.
    return gr.Image(
        label=label,
        show_label=False,
        format="png",
        type="pil",
        interactive=False,
        container=False,
        buttons=["download", "fullscreen"],
        elem_classes="shot",
        alt_text=label,
    )


async def _result(job: Job) -> schema.Result:
    try:
        return await asyncio.wrap_future(job.future)
    except asyncio.CancelledError:
        job.cancel()
        raise


def _students(engine: Engine, guidance: float | None) -> float | None:
    """The guidance box is the teacher's; a guidance-free student has none."""
    return None if engine.limits is None or engine.limits.guidance_free else guidance


def _pil(result: schema.Result, model: str) -> Image.Image:
    image = Image.fromarray(result.shots[model].image)
    image.info[schema.KEY] = json.dumps(result.settings(model))
    return image


def _entry(result: schema.Result, model: str) -> dict[str, Any]:
    return {"image": _pil(result, model), "settings": result.settings(model)}


def _gallery(past: list[dict[str, Any]]) -> list[tuple[Image.Image, str]]:
    """The newest first, captioned S1 for one step of the student and T50 for fifty of the teacher."""
    told = [(entry["image"], entry["settings"]) for entry in reversed(past)]
    return [(image, f"{settings['model'][0].upper()}{settings['steps']}") for image, settings in told]


def _recall(past: list[dict[str, Any]], event: gr.SelectData) -> Any:
    return _fill(past[len(past) - 1 - event.index]["settings"])


def _fill(values: dict[str, Any]) -> tuple[Any, ...]:
    """Prompt, steps, seed and the new-seed box from settings; the teacher's steps are not the student's."""
    chosen = values["steps"] if values["model"] == "student" else gr.skip()
    return values["prompt"], chosen, values["seed"], False


def _read(data: bytes | None, engine: Engine) -> tuple[Any, ...]:
    """Fill the form from a dropped PNG; what it says is checked like anything typed."""
    try:
        _, text = schema.read_png(data or b"")
        if text is None:
            raise UserError("this PNG carries no settings; only images downloaded from this page do.")
        request = schema.from_settings(text, engine.limits)
    except UserError as error:
        raise gr.Error(str(error), duration=8, print_exception=False) from None
    values = schema.settings(request)
    said = f"{request.model}, {request.steps} steps, seed {request.seed}\n{request.prompt}"
    return *_fill(values), gr.Textbox(said, visible=True)


def _scene() -> str:
    return scenes.sample_scene(np.random.default_rng()).caption


# Text of gr.HTML: numbers and escaped names only ------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.9995 else f"{value * 1000:.0f} ms"


def _steps(count: int) -> str:
    return f"{count} step" + ("s" if count != 1 else "")


def _head(name: str, facts: str, part: float | None = None) -> str:
    bar = "" if part is None else f'<i class="bar"><i style="width:{100 * part:.0f}%"></i></i>'
    return f'<div class="model-head"><b>{name}</b><span>{html.escape(facts)}</span>{bar}</div>'


def _facts(result: schema.Result, model: str) -> str:
    shot = result.shots[model]
    return f"{_steps(shot.steps)} · {_seconds(shot.total)}"


def _hint() -> str:
    return '<p class="hint">Press Generate: both images start from the same noise.</p>'


def _verdict(shots: dict[str, schema.Shot]) -> str:
    """The line people look at, and under it where the time went, both models on one scale."""
    order = [shots[model] for model in ("teacher", "student") if model in shots]
    longest = max(shot.total for shot in order) or 1.0
    parts = [
        f"<span>{shot.model} {_steps(shot.steps)} <b>{_seconds(shot.total)}</b></span>" for shot in order
    ]
    if len(order) == 2:
        ratio = order[0].total / max(order[1].total, 1e-9)
        parts.append(
            f'<span class="times">{ratio:.0f}×</span>'
            if ratio >= 10
            else f'<span class="times">{ratio:.1f}×</span>'
        )
    rows = "".join(_split(shot, longest) for shot in order)
    key = "".join(f'<i class="{name}"></i>{name} ' for name in ("text", "denoise", "decode"))
    return (
        f'<div class="line">{"".join(parts)}</div><div class="split">{rows}</div><div class="key">{key}</div>'
    )


def _split(shot: schema.Shot, longest: float) -> str:
    stages = (("text", shot.text), ("denoise", shot.denoise), ("decode", shot.decode))
    bars = "".join(
        f'<i class="{name}" style="width:{100 * value / longest:.2f}%"></i>' for name, value in stages
    )
    words = " + ".join(f"{name} {_seconds(value)}" for name, value in stages)
    return (
        f'<div class="row"><em>{shot.model}</em><div class="track">{bars}</div><small>{words}</small></div>'
    )


def _status(engine: Engine) -> str:
    words = {"ready": "ready", "failed": "not available", "closed": "stopped"}.get(
        engine.state, "loading the models"
    )
    return f'<span class="pill {engine.state}">{words}</span>'


def _footer(engine: Engine) -> str:
    about = engine.report()
    if about.get("problem"):
        return f'<div class="facts"><span class="bad">{html.escape(about["problem"])}</span></div>'
    facts = []
    for model in ("student", "teacher"):
        if about.get(model):
            count = sum(about.get(f"{model}_parameters", {}).values())
            name = model if about[model] == model else f"{model}: {about[model]}"
            facts.append(f"{name} ({_count(count)} parameters)" if count else name)
    facts.append(f"{about.get('device_name', about['device'])}, {about['dtype']}")
    if "attention" in about:
        facts.append(f"attention: {about['attention']}")
    if about["device"] == "cpu" and "threads" in about:
        facts.append(f"{about['threads']} thread" + ("s" if about["threads"] != 1 else ""))
    return '<div class="facts">' + "".join(f"<span>{html.escape(fact)}</span>" for fact in facts) + "</div>"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
