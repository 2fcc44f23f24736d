"""The same engine for whoever calls it with gradio_client. Of Gradio the calls are served, and not its page."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from app.engine import Engine
from app.openai import MAX_IMAGES, seeds_of
from app.page import Page
from app.png import KEY, PARAMETERS, parameters
from app.request import MAX_PROMPT, MAX_SEED, Request, validate
from app.result import Result
from stepdistill.errors import UserError


def build(engine: Engine) -> gr.Blocks:
    """The page of `engine`, which may still be loading. Its one function is called "/generate"."""

    async def generate(
        prompt: str,
        model: str = "student",
        steps: int | None = None,
        seed: int = -1,
        n: int = 1,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Images of a prompt, and the settings of each. seed -1 is drawn; an empty number is the model's own."""
        try:
            asked = Request(
                prompt, negative_prompt or "", -1 if seed is None else seed, steps, guidance_scale, model
            )
            requests = seeds_of(validate(asked, engine.limits), n)
            jobs = engine.submit(requests)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        try:
            results = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            for job in jobs:
                job.cancel()
        return [picture(result) for result in results], [result.settings() for result in results]

    with Page(title="stepdistill", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        prompt = gr.Textbox(label="prompt", max_length=MAX_PROMPT)
        model = gr.Dropdown(list(engine.entries), value="student", label="model")
        steps = gr.Number(None, label="steps", precision=0, minimum=1)
        seed = gr.Number(-1, label="seed", precision=0, minimum=-1, maximum=MAX_SEED)
        n = gr.Slider(1, MAX_IMAGES, 1, step=1, label="n")
        negative = gr.Textbox(label="negative_prompt", max_length=MAX_PROMPT)
        guidance = gr.Number(None, label="guidance_scale", minimum=1)
        go = gr.Button("Generate")
        # PNG and not Gradio's default lossy WebP: the download must be the pixels, with the settings inside.
        images = gr.Gallery(label="images", format="png")
        said = gr.JSON(label="settings")
        go.click(
            generate,
            [prompt, model, steps, seed, n, negative, guidance],
            [images, said],
            api_name="generate",
        )
    return page


def picture(result: Result) -> Image.Image:
    """The image with its settings, which Gradio writes into the file."""
    image = Image.fromarray(result.image)
    values = result.settings()
    image.info[KEY], image.info[PARAMETERS] = json.dumps(values), parameters(values)
    return image


def mounted(engine: Engine) -> tuple[gr.Blocks, Any, FastAPI]:
    """The page, Gradio's application of it, which is served below a path, and the one it is mounted in."""
    page = build(engine)
    page.state_session_capacity = 500
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
    )
    route = next(route for route in parent.routes if getattr(route, "path", None) in ("", "/"))
    return page, route.app, parent
