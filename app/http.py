"""The web server around the engine: health, an OpenAI-shaped image route, and the page mounted at /.

`app.guard` stands before all of it, `app.gate` before the page.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from app.engine import Engine, Job
from app.gate import Gate
from app.guard import LOOPBACK, Guard, parse
from app.schema import MAX_FILE, MAX_SEED, Busy, Cancelled, Invalid, Request, Result
from stepdistill.errors import UserError, nearest

MAX_IMAGES = 8
FIELDS = (
    "prompt",
    "negative_prompt",
    "n",
    "size",
    "model",
    "response_format",
    "seed",
    "steps",
    "guidance_scale",
)


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
        limits = engine.limits
        if limits is None:
            return _error(Busy("the models are still loading; try again in a moment."))
        size = "{1}x{0}".format(*limits.resolution)
        rows = [
            {
                "id": "student",
                "name": limits.student,
                "steps": list(limits.steps),
                "default_steps": limits.default_steps,
            }
        ]
        if limits.teacher is not None:
            rows.append({"id": "teacher", "name": limits.teacher, "default_steps": limits.teacher_steps})
        return JSONResponse(
            {
                "object": "list",
                "data": [{"object": "model", "owned_by": "local", "size": size, **row} for row in rows],
            }
        )

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
        blocked_paths=[str(Path(path).resolve()) for path in engine.directories],
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
    """Settings that Gradio and the hub client read when they are imported: nothing is asked of another
    host.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"


# The OpenAI-shaped route ------------------------------------------------------------------------------------


def _wanted(body: dict[str, Any], engine: Engine) -> tuple[int, Request]:
    """How many images, and the request of the first.

    Fields this server does not know are refused, not ignored.
    """
    for key in body:
        if key not in FIELDS:
            raise Invalid(
                key[:40],
                f"{key[:40]!r} is not supported here; use {', '.join(FIELDS)}.{nearest(key, FIELDS)}",
            )
    if "prompt" not in body:
        raise Invalid("prompt", "prompt is missing.")
    count = body.get("n", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES:
        raise Invalid("n", f"n must be a whole number from 1 to {MAX_IMAGES}, got {str(count)[:40]}.")
    if body.get("response_format", "b64_json") != "b64_json":
        raise Invalid(
            "response_format", "response_format must be b64_json; images are not kept on this server."
        )
    model = body.get("model", "student")
    if model not in ("student", "teacher"):
        raise Invalid("model", f"model must be student or teacher, got {str(model)[:40]!r}.")
    if engine.limits is not None:
        size = "{1}x{0}".format(*engine.limits.resolution)
        if body.get("size", "auto") not in ("auto", size):
            raise Invalid("size", f"size must be {size} (or auto), got {str(body['size'])[:40]!r}.")
    same = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale")
    return count, Request(model=model, **{key: body[key] for key in same if key in body})


async def _one(engine: Engine, http: HttpRequest, request: Request, at: int) -> dict[str, Any]:
    """Image number `at` of a call: its own seed, seed + at where one was given."""
    if at and isinstance(request.seed, int) and request.seed != -1:
        request = Request(**{**request.__dict__, "seed": (request.seed + at) % (MAX_SEED + 1)})
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
