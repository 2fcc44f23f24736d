"""The same engine as a Gradio page, and for whoever calls it with gradio_client. Knows no torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from app.answers import awaited
from app.batcher import Job
from app.catalog import STUDENT, TEACHER
from app.engine import Engine
from app.openai import MAX_IMAGES, seeds_of
from app.page import Page
from app.png import KEY, PARAMETERS, parameters
from app.request import MAX_PROMPT, MAX_SEED, Limits, Request, validate
from app.result import Result
from stepdistill.errors import UserError

PROMPT = "a small red circle above a large blue square on a yellow background"
CSS = """
.pixels img { object-fit: contain !important; image-rendering: pixelated; width: 100%; height: 100%; }
.pixels .thumbnail-item { max-height: 440px; }
footer { display: none !important; }
"""
# Of the buttons on an image; Gradio's other one would send it to another host.
KEEP = ["download", "fullscreen"]
FONTS = ("system-ui", "sans-serif")


def build(engine: Engine) -> gr.Blocks:
    """The page of `engine`, which may still be loading. Its functions are called "/generate" and "/compare"."""
    draws = Draws(engine)
    # Files are kept for half an hour: whoever wants an image for longer downloads it.
    with Page(draws, title="stepdistill", analytics_enabled=False, delete_cache=(120, 1800)) as page:
        gr.Markdown("# stepdistill\nMany diffusion steps, distilled into one to four. [To the studio](/)")
        with gr.Tab("Create"):
            _create(engine, draws, page)
        with gr.Tab("Compare"):
            _compare(engine, draws, page)
    return page


def _create(engine: Engine, draws: Draws, page: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=3):
            # PNG and not Gradio's default lossy WebP: the download must be the pixels, with the settings inside.
            images = gr.Gallery(
                label="images", format="png", columns=4, height=500, buttons=KEEP, elem_classes="pixels"
            )
        with gr.Column(scale=2):
            prompt = gr.Textbox(PROMPT, label="prompt", max_length=MAX_PROMPT, submit_btn=False)
            with gr.Row():
                go, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
            model = _models(engine, STUDENT, "model")
            with gr.Row():
                steps = _count("steps")
                seed = gr.Number(
                    -1, label="seed", info="-1 draws one.", precision=0, minimum=-1, maximum=MAX_SEED
                )
            n = gr.Slider(1, MAX_IMAGES, 1, step=1, label="variations")
            guidance = gr.Number(None, label="guidance", minimum=1, visible=False)
            negative = gr.Textbox(label="negative prompt", max_length=MAX_PROMPT, visible=False)
    with gr.Accordion("Settings of these images", open=False):
        said = gr.JSON(label="settings")
    asked = [prompt, model, steps, seed, n, negative, guidance]
    gr.on([go.click, prompt.submit], draws.generate, asked, [images, said], api_name="generate")
    stop.click(draws.stop, api_visibility="private")
    fitted = [steps, guidance, negative]
    gr.on([model.change, page.load], draws.fitted, [model], fitted, api_visibility="private")


def _compare(engine: Engine, draws: Draws, page: gr.Blocks) -> None:
    slow = TEACHER if TEACHER in engine.entries else next(reversed(engine.entries))
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(PROMPT, label="prompt", max_length=MAX_PROMPT, scale=4)
        go, stop = gr.Button("Draw both", variant="primary", scale=1), gr.Button("Stop", scale=1)
    with gr.Row():
        left, left_steps = _models(engine, slow, "left"), _count("steps of the left")
        right, right_steps = _models(engine, STUDENT, "right"), _count("steps of the right")
        seed = gr.Number(7, label="seed", precision=0, minimum=-1, maximum=MAX_SEED)
    with gr.Tab("Side by side"), gr.Row():
        pair = [
            gr.Image(
                label=side, format="png", interactive=False, height=380, buttons=KEEP, elem_classes="pixels"
            )
            for side in ("left image", "right image")
        ]
    with gr.Tab("Slider"):
        slider = gr.ImageSlider(
            label="left | right", format="png", height=440, buttons=KEEP, elem_classes="pixels"
        )
    said = gr.Textbox(label="of", interactive=False, lines=2)
    asked = [prompt, seed, left, left_steps, right, right_steps]
    gr.on([go.click, prompt.submit], draws.compare, asked, [*pair, slider, said], api_name="compare")
    stop.click(draws.stop, api_visibility="private")
    for model, steps in ((left, left_steps), (right, right_steps)):
        gr.on([model.change, page.load], draws.steps, [model], [steps], api_visibility="private")


def _count(label: str) -> gr.Number:
    return gr.Number(None, label=label, precision=0, minimum=1)


def _models(engine: Engine, chosen: str, label: str) -> gr.Dropdown:
    choices = [(f"{name}: {entry.title}", name) for name, entry in engine.entries.items()]
    return gr.Dropdown(choices, value=chosen, label=label)


class Draws:
    """What the functions of the page do, and what each of its tabs draws now, so that Stop ends it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: dict[str, set[Job]] = {}

    async def generate(
        self,
        prompt: str,
        model: str = STUDENT,
        steps: int | None = None,
        seed: int = -1,
        n: int = 1,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        request: gr.Request = None,
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Images of a prompt, and the settings of each. seed -1 is drawn; an empty number is the model's own."""
        with _plainly():
            asked = _asked(prompt, model, steps, seed, negative_prompt, guidance_scale)
            jobs = self.engine.submit(seeds_of(validate(asked, self.engine.limits), n))
            with self._of(request, jobs) as futures:
                results = await asyncio.gather(*futures)
        return [picture(result) for result in results], [result.settings() for result in results]

    async def compare(
        self,
        prompt: str,
        seed: int = 7,
        left: str = TEACHER,
        left_steps: int | None = None,
        right: str = STUDENT,
        right_steps: int | None = None,
        request: gr.Request = None,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Two models from the same noise: both images, both again for a slider, and what they are of."""
        # An empty pair first: no image of before stands beside one of this request.
        yield None, None, None, "drawing"
        with _plainly():
            first = validate(_asked(prompt, left, left_steps, seed), self.engine.limits)
            second = validate(_asked(prompt, right, right_steps, first.seed), self.engine.limits)
            jobs = self.engine.submit([first, second])
            pictures: list[Image.Image | None] = [None, None]
            with self._of(request, jobs) as futures:
                # The quick one first: it is there at once.
                for at in sorted((0, 1), key=lambda at: not jobs[at].short):
                    pictures[at] = picture(await futures[at])
                    yield *pictures, None, f"{prompt}; seed {first.seed}; drawing the other"
                results = [future.result() for future in futures]
        one, other = results
        ratio = one.total / max(other.total, 1e-9)
        said = "; ".join(
            f"{r.name} in {r.request.steps} steps, {1000 * r.total:.0f} ms" for r in (one, other)
        )
        yield *pictures, tuple(pictures), f"{prompt}; seed {first.seed}; {said}; {ratio:.1f} times as long"

    def stop(self, request: gr.Request = None) -> None:
        """End what this tab draws."""
        self.end(_tab(request))

    def end(self, tab: str) -> None:
        """End what is drawn for a tab, also one that has gone."""
        for job in self._jobs.get(tab, ()):
            job.cancel()

    async def fitted(self, model: str) -> tuple[Any, Any, Any]:
        """The fields of steps, guidance and negative prompt as a model takes them."""
        limits = await self._limits(model)
        guided = limits is not None and not limits.guidance_free
        guidance = gr.Number(limits.default_guidance if guided else None, visible=guided)
        return _steps(limits), guidance, gr.Textbox(visible=True) if guided else gr.Textbox("", visible=False)

    async def steps(self, model: str) -> Any:
        """The field of steps alone."""
        return _steps(await self._limits(model))

    async def _limits(self, model: str) -> Limits | None:
        """Of a model, which is loaded for it; None where that takes long or fails."""
        entry = self.engine.entries.get(model)
        if entry is None:
            raise gr.Error("there is no such model.", print_exception=False)
        if entry.state == "idle":
            self.engine.load(model)
        for _ in range(150):
            if entry.limits is not None or entry.state == "failed":
                break
            await asyncio.sleep(0.2)
        return entry.limits

    @contextlib.contextmanager
    def _of(self, request: gr.Request | None, jobs: list[Job]) -> Iterator[list[asyncio.Future]]:
        """The futures of what a tab draws, which Stop knows meanwhile."""
        tab = _tab(request)
        mine = self._jobs.setdefault(tab, set())
        mine.update(jobs)
        try:
            with awaited(jobs) as futures:
                yield futures
        finally:
            mine.difference_update(jobs)
            if not mine:
                self._jobs.pop(tab, None)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """A refusal is Gradio's error, without a traceback in the log."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _steps(limits: Limits | None) -> Any:
    if limits is None:
        return gr.skip()
    return gr.Number(
        limits.default_steps,
        info=f"{', '.join(map(str, limits.steps))}." if limits.steps else f"1 to {limits.max_steps}.",
    )


def _asked(
    prompt: str, model: str, steps: Any, seed: Any, negative: str = "", guidance: Any = None
) -> Request:
    return Request(prompt, negative or "", -1 if seed is None else seed, steps, guidance, model)


def _tab(request: gr.Request | None) -> str:
    return getattr(request, "session_hash", None) or ""


def picture(result: Result) -> Image.Image:
    """The image with its settings, which Gradio writes into the file."""
    image = Image.fromarray(result.image)
    values = result.settings()
    image.info[KEY], image.info[PARAMETERS] = json.dumps(values), parameters(values)
    return image


def mounted(engine: Engine) -> tuple[gr.Blocks, Any, FastAPI]:
    """The page, Gradio's application of it, which is served below a path, and the one it is mounted in."""
    page = build(engine)
    # Of tabs whose changed fields are remembered; nothing depends on them.
    page.state_session_capacity = 32
    # api_open=False closes POST /gradio_api/run/..., which would skip the queue and its limits.
    page.queue(api_open=False, max_size=64, default_concurrency_limit=None)
    parent = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        parent,
        page,
        path="/",
        show_error=False,
        allowed_paths=[],
        blocked_paths=[str(entry.path.resolve()) for entry in engine.entries.values()],
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
    route = next(route for route in parent.routes if getattr(route, "path", None) in ("", "/"))
    return page, route.app, parent
