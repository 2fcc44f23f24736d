"""The web server around the engine: guards, health, an OpenAI-shaped image route, and the page mounted at /.

What Gradio leaves open is closed here, before a request reaches it: the Host header (DNS rebinding), the
Origin of a POST (cross-site upload forms), the size of a body, and the headers against framing and sniffing.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from app.engine import Engine, Job
from app.schema import MAX_FILE, MAX_SEED, Busy, Cancelled, Invalid, Request, Result
from stepdistill.errors import UserError, nearest

MAX_JSON = 64 * 1024
MAX_IMAGES = 8
UPLOAD = "/gradio_api/upload"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
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

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def create_app(
    engine: Engine, demo: Any = None, *, hosts: Iterable[str] = LOOPBACK, any_address: bool = False
) -> FastAPI:
    """The whole server. `demo` is the page (gr.Blocks) or None for the routes alone.

    Args:
        hosts: names a request may use for this server, without port.
        any_address: also accept a Host that is an IP address: needed when listening on all addresses, and
            safe, as DNS rebinding always comes with a name.
    """
    app = FastAPI(title="stepdistill", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=tuple(hosts), any_address=any_address)

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
            body = _parse(await http.body(), http.headers.get("content-type", ""))
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


def offline() -> None:
    """Settings that Gradio and the hub client read when they are imported: nothing is asked of another
    host.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"


# The OpenAI-shaped route ------------------------------------------------------------------------------------


def _parse(raw: bytes, content_type: str) -> dict[str, Any]:
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise Invalid("content-type", "send the request as content-type application/json.")
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Invalid("body", "the body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Invalid("body", "the body must be a JSON object.")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


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


# Guards -----------------------------------------------------------------------------------------------------


class Guard:
    """ASGI middleware: Host, Origin of a POST, body size, security headers.

    Streams pass through untouched.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] = LOOPBACK, any_address: bool = False) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _reply(send, *refusal)
            return

        cap = MAX_FILE + MAX_JSON if scope["path"].rstrip("/").endswith(UPLOAD) else MAX_JSON
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > cap:
            await _reply(send, 413, f"the body is larger than the {cap} bytes allowed")
            return
        received, started = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > cap:  # a chunked body does not say its length
                raise _TooLarge
            return message

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message.get("headers", [])}
                extra = [pair for pair in HEADERS if pair[0] not in present]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except _TooLarge:
            if not started:
                await _reply(send, 413, f"the body is larger than the {cap} bytes allowed")

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._is_ours(_name(host)):
            return 400, "this Host name is not served here"
        if scope.get("method") in ("GET", "HEAD", "OPTIONS"):
            return None
        origin = headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1].lower() != host.lower():
            return 403, "requests from other sites are refused"
        if headers.get("sec-fetch-site") == "cross-site":
            return 403, "requests from other sites are refused"
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self.hosts:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _TooLarge(Exception):
    pass


def _name(host: str) -> str:
    """The name in a Host header, lower case, without port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host


async def _reply(send: Send, status: int, message: str) -> None:
    body = json.dumps(
        {"error": {"message": message + ".", "type": "refused", "param": None, "code": None}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
