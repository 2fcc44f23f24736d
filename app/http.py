"""The web server around the engine: health, an OpenAI-shaped image route, and the page mounted at /.

`app.guard` stands before all of it, `app.gate` before the page.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from app.engine import Engine
from app.gate import Gate
from app.guard import LOOPBACK, Guard, parse
from app.lanes import Job
from app.png import MAX_FILE
from app.request import (
    MAX_SEED,
    Busy,
    Cancelled,
    Count,
    Guidance,
    Invalid,
    Limits,
    Request,
    Seed,
    Text,
    shown,
)
from app.result import Result
from stepdistill.errors import UserError

MAX_IMAGES = 8


class ImageCall(BaseModel):
    """The body of an image call: OpenAI's fields that mean something here, and ours."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    negative_prompt: Text = ""
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = 1
    size: Text = "auto"
    model: Literal["student", "teacher"] = "student"
    response_format: Literal["b64_json"] = "b64_json"
    seed: Seed = -1
    steps: Count | None = None
    guidance_scale: Guidance | None = None


def create_app(
    engine: Engine,
    demo: Any = None,
    *,
    hosts: Iterable[str] = LOOPBACK,
    any_address: bool = False,
    account: str | None = None,
) -> FastAPI:
    """The whole server. `demo` is the page (gr.Blocks) or None for the routes alone.

    Args:
        hosts: names a request may use for this server, without port.
        any_address: also accept a Host that is an IP address: needed when listening on all addresses, and
            safe, as DNS rebinding always comes with a name.
        account: "USER:PASSWORD" that every request but those for /healthz has to give (HTTP Basic).
    """
    app = FastAPI(title="stepdistill", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=tuple(hosts), any_address=any_address, account=account)

    @app.get("/healthz")
    def health() -> JSONResponse:
        report = engine.report()
        return JSONResponse(report, status_code=200 if engine.state == "ready" else 503)

    @app.get("/v1/models")
    def models() -> JSONResponse:
        if engine.limits is None:
            return _error(Busy("the models are still loading; try again in a moment."))
        return JSONResponse({"object": "list", "data": _models(engine.limits)})

    @app.post("/v1/images/generations")
    async def generations(http: HttpRequest) -> JSONResponse:
        try:
            if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                raise Invalid("content-type", "send the request as content-type application/json.")
            body = parse(await http.body())
            count, request = _wanted(body, engine)
            images = [await _one(engine, http, request, at) for at in range(count)]
        except UserError as error:
            return _error(error)
        return JSONResponse({"created": int(time.time()), "model": request.model, "data": images})

    if demo is not None:
        _mount(app, demo, engine)
    return app


def _mount(app: FastAPI, demo: Any, engine: Engine) -> None:
    import gradio as gr
    from gradio.utils import get_upload_folder

    from app import ui

    demo.state_session_capacity = 500
    # api_open=False closes POST /gradio_api/run/..., which would skip the queue and its limits.
    demo.queue(api_open=False, max_size=64, default_concurrency_limit=None)
    gr.mount_gradio_app(
        app,
        demo,
        path="/",
        show_error=False,
        max_file_size=MAX_FILE,
        allowed_paths=[],
        blocked_paths=[str(Path(path).resolve()) for path in engine.models.paths.values()],
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        **ui.look(),
    )
    mounted = next(route for route in app.routes if getattr(route, "path", None) in ("", "/"))
    mounted.app = Gate(mounted.app, demo, get_upload_folder())


def offline() -> None:
    """Settings that Gradio and the hub client read on import, so that they ask no other host."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"


# The OpenAI-shaped route ------------------------------------------------------------------------------------


def _models(limits: Limits) -> list[dict[str, Any]]:
    same = {"object": "model", "owned_by": "local", "size": "{1}x{0}".format(*limits.resolution)}
    student = {"steps": list(limits.steps), "default_steps": limits.default_steps}
    rows = [{**same, "id": "student", "name": limits.student, **student}]
    if limits.teacher is not None:
        rows.append({**same, "id": "teacher", "name": limits.teacher, "default_steps": limits.teacher_steps})
    return rows


def _wanted(body: dict[str, Any], engine: Engine) -> tuple[int, Request]:
    """How many images, and the request of the first.

    Fields this server does not know are refused, not ignored.
    """
    try:
        call = ImageCall.model_validate(body)
    except ValidationError as error:
        raise Invalid.of(error, ImageCall.model_fields) from None
    if engine.limits is not None:
        size = "{1}x{0}".format(*engine.limits.resolution)
        if call.size not in ("auto", size):
            raise Invalid("size", f"size must be {size} (or auto), got {shown(call.size)}.")
    return call.n, Request(**call.model_dump(exclude={"n", "size", "response_format"}))


async def _one(engine: Engine, http: HttpRequest, request: Request, at: int) -> dict[str, Any]:
    """Image number `at` of a call: its own seed, seed + at where one was given."""
    if at and request.seed != -1:
        request = replace(request, seed=(request.seed + at) % (MAX_SEED + 1))
    job = engine.submit(request)
    result = await wait(job, http.is_disconnected)
    shot = result.shots[request.model]
    return {
        "b64_json": base64.b64encode(result.png(request.model)).decode("ascii"),
        "seed": result.request.seed,
        "steps": shot.steps,
        "seconds": {name: round(value, 4) for name, value in shot.timings.items()},
    }


async def wait(job: Job, gone: Callable[[], Awaitable[bool]]) -> Result:
    """The result of a job, without blocking the event loop.

    When the one who asked has gone, the job is stopped.
    """
    future = asyncio.wrap_future(job.future)
    try:
        while True:
            done, _ = await asyncio.wait({future}, timeout=0.5)
            if done:
                return future.result()
            if await gone():
                raise Cancelled("the client went away.")
    finally:
        if not future.done():
            job.cancel()
            future.cancel()


def _error(error: UserError) -> JSONResponse:
    status, kind = 500, "server_error"
    if isinstance(error, Invalid):
        status, kind = 400, "invalid_request_error"
    elif isinstance(error, Busy):
        status, kind = 503, "busy"
    elif isinstance(error, Cancelled):
        status, kind = 409, "cancelled"
    headers = {"retry-after": "1"} if status == 503 else None
    body = {"message": str(error), "type": kind, "param": getattr(error, "field", None), "code": None}
    return JSONResponse({"error": body}, status_code=status, headers=headers)
