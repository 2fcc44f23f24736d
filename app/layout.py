"""Where everything on the page stands, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import words
from app.engine import Engine
from app.request import MAX_SEED, Limits

EXAMPLES = (
    "a small red circle above a large blue square on a yellow background",
    "a large green star on a black background",
    "a large purple diamond left of a small white cross on a cyan background",
    "a small yellow triangle below a large red circle on a white background",
)


@dataclass
class Parts:
    """The components that handlers read or change."""

    status: gr.HTML
    prompt: gr.Textbox
    go: gr.Button
    stop: gr.Button
    chips: list[gr.Button]
    surprise: gr.Button
    steps: gr.Radio
    seed: gr.Number
    dice: gr.Button
    fresh: gr.Checkbox
    alone: gr.Checkbox
    live: gr.Checkbox
    advanced: gr.Accordion
    negative: gr.Textbox
    guidance: gr.Slider
    drop: gr.File
    read_back: gr.Textbox
    teacher_card: gr.Column
    teacher_head: gr.HTML
    teacher: gr.Image
    student_head: gr.HTML
    student: gr.Image
    verdict: gr.HTML
    album: gr.Column
    gallery: gr.Gallery
    footer: gr.HTML
    past: gr.State
    clock: gr.Timer


def lay_out(engine: Engine) -> Parts:
    """Everything on the page, made inside the `gr.Blocks` that is being built."""
    parts: dict[str, Any] = {**_top(engine), **_ask()}
    with gr.Row(elem_classes="stage"):
        with gr.Column(scale=0, min_width=264, elem_classes="controls"):
            parts |= _controls()
        with gr.Column(scale=1, elem_classes="outputs"):
            parts |= _outputs()
    parts["footer"] = gr.HTML(words.footer(engine), elem_classes="report")
    return Parts(**parts, past=gr.State([], time_to_live=3600), clock=gr.Timer(1.0))


def _top(engine: Engine) -> dict[str, Any]:
    with gr.Row(elem_classes="top"):
        gr.HTML(
            "<h1>stepdistill</h1><p>Many diffusion steps, distilled into one to four.</p>",
            elem_classes="title",
        )
        status = gr.HTML(words.status(engine), elem_classes="status")
    return {"status": status}


def _ask() -> dict[str, Any]:
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
            max_length=Limits.max_prompt,
        )
        go = gr.Button("Generate", variant="primary", scale=1, min_width=120, elem_id="go")
        stop = gr.Button("Stop", variant="secondary", scale=0, min_width=76, elem_id="stop")
    with gr.Row(elem_classes="chips"):
        chips = [gr.Button(text, size="sm", min_width=0, scale=0) for text in EXAMPLES]
        surprise = gr.Button("Surprise me", size="sm", min_width=0, scale=0, elem_classes="surprise")
    return {"prompt": prompt, "go": go, "stop": stop, "chips": chips, "surprise": surprise}


def _controls() -> dict[str, Any]:
    steps = gr.Radio([1], value=1, label="Student steps", elem_classes="steps")
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(
            value=0, precision=0, label="Seed", minimum=0, maximum=MAX_SEED, scale=3, min_width=90
        )
        dice = gr.Button("Draw a seed", scale=0, min_width=44, elem_id="dice")
    fresh = gr.Checkbox(value=True, label="New seed every time")
    alone = gr.Checkbox(value=False, label="Student only (no waiting)")
    live = gr.Checkbox(value=False, label="Live: draw while I type")
    # What is in it, and whether there is anything, depends on the models.
    with gr.Accordion("Advanced", open=False, visible=False) as advanced:
        negative = gr.Textbox(
            label="Negative prompt",
            lines=2,
            max_length=Limits.max_prompt,
            visible=False,
        )
        guidance = gr.Slider(1, 15, value=7.5, step=0.5, label="Teacher guidance", visible=False)
    with gr.Accordion("Settings from an image", open=False):
        drop = gr.File(label="A PNG downloaded here", file_types=[".png"], type="binary", height=110)
        read_back = gr.Textbox(label="Read back", interactive=False, visible=False, lines=3)
    return {
        "steps": steps, "seed": seed, "dice": dice, "fresh": fresh, "alone": alone, "live": live,
        "advanced": advanced, "negative": negative, "guidance": guidance, "drop": drop, "read_back": read_back,
    }  # fmt: skip


def _outputs() -> dict[str, Any]:
    with gr.Row(elem_classes="pair"):
        with gr.Column(min_width=150, elem_classes="card") as teacher_card:
            teacher_head = gr.HTML(words.head("Teacher", ""))
            teacher = _picture("Teacher image")
        with gr.Column(min_width=150, elem_classes="card"):
            student_head = gr.HTML(words.head("Student", ""))
            student = _picture("Student image")
    verdict = gr.HTML(words.hint(), elem_classes="verdict")
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
    return {
        "teacher_card": teacher_card, "teacher_head": teacher_head, "teacher": teacher,
        "student_head": student_head, "student": student, "verdict": verdict,
        "album": album, "gallery": gallery,
    }  # fmt: skip


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
