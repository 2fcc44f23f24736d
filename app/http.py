"""The web server around the engine: health, metrics, an OpenAI-shaped image route, the page, and what
gradio_client calls.

`app.guard` stands before all of it, `app.gate` before Gradio.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from app import openai, studio
from app.engine import Engine
from app.gate import Gate
from app.guard import LOOPBACK, Guard
from app.later import Later


def create_app(
    engine: Engine,
    *,
    hosts: Iterable[str] = LOOPBACK,
    any_address: bool = False,
    account: str | None = None,
    openapi: bool = False,
    gradio: bool = True,
    results: Path | None = None,
    runs: tuple[Path, ...] = (),
) -> FastAPI:
    """The whole server.

    Args:
        hosts: names a request may use for this server, without port.
        any_address: also accept a Host that is an IP address: needed when listening on all addresses, and
            safe, as DNS rebinding always comes with a name.
        account: "USER:PASSWORD" that every request but those for /healthz has to give (HTTP Basic).
        openapi: serve a description of the HTTP API at /openapi.json.
        gradio: serve Gradio's page at /gradio/, and answer gradio_client.
        results: an evaluation's results.json, runs: directories of training runs, for the page.
    """
    later = Later(engine)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await later.close()

    address = "/openapi.json" if openapi else None
    app = FastAPI(title="stepdistill", docs_url=None, redoc_url=None, openapi_url=address, lifespan=life)
    app.add_middleware(Guard, hosts=tuple(hosts), any_address=any_address, account=account, full=engine.full)

    @app.get("/healthz")
    async def health() -> JSONResponse:
        return JSONResponse(engine.report(), status_code=200 if engine.state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        text = engine.metrics.prometheus(len(engine.batcher), engine.state == "ready")
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(openai.routes(engine))
    app.include_router(studio.routes(engine, results, runs))
    if gradio:
        # Without the slash its page would look for its files beside it.
        app.get("/gradio", include_in_schema=False)(lambda: RedirectResponse("/gradio/"))
        app.mount("/gradio", Gate(later, page=True))
        app.mount("/", Gate(later))
    app.state.later = later
    return app
