"""What the page asks: drawing with progress, Stop, tokens, reading a PNG back, and what its tabs show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from app import pictures, readback, results, runs
from app.answers import awaited, body_of, error_of, png64, refusal
from app.batcher import Job
from app.catalog import Entry
from app.engine import Engine
from app.openai import MAX_IMAGES, seeds_of
from app.request import Invalid, check, shown, validate
from app.result import Result
from app.tokens import Reader
from stepdistill.errors import UserError

STATIC = Path(__file__).parent / "static"
# Seconds between two lines of progress.
TICK = 0.2
Session = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
_A_SESSION = TypeAdapter(Session)
# The header that says it beside a file.
SESSION = "x-session"
Number = Annotated[StrictInt, Field(ge=0, lt=2**53)]


class Draw(BaseModel):
    """A drawing that the page asks for; `number` counts those of a tab, and Stop names the last it means."""

    model_config = ConfigDict(extra="forbid")

    request: dict[str, Any]
    session: Session
    number: Number
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = 1
    live: StrictBool = False
    embed: StrictBool = True


class Stop(BaseModel):
    model_config = ConfigDict(extra="forbid")

    session: Session
    number: Number


class Named(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    prompt: StrictStr = ""


def routes(engine: Engine, results_file: Path | None = None, run_dirs: tuple[Path, ...] = ()) -> APIRouter:
    """/, and /api/... below it."""
    router = APIRouter(include_in_schema=False)
    _page(router)
    _drawing(router, engine)
    _reading(router, engine)
    _tabs(router, engine, results_file, run_dirs)
    return router


def _answered(route: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """A route whose mistakes are answered as every route's are."""

    async def answered(http: HttpRequest) -> Response:
        try:
            return await route(http)
        except UserError as error:
            return refusal(error)

    return answered


def _drawing(router: APIRouter, engine: Engine) -> None:
    @router.post("/api/generate")
    @_answered
    async def generate(http: HttpRequest) -> Response:
        draw = _of(Draw, await body_of(http))
        request = validate(check(draw.request), engine.limits)
        jobs = engine.submit(seeds_of(request, draw.n), draw.session, live=draw.live, number=draw.number)
        return StreamingResponse(_drawn(jobs, draw.embed), media_type="application/x-ndjson")

    @router.post("/api/stop")
    @_answered
    async def stop(http: HttpRequest) -> Response:
        wanted = _of(Stop, await body_of(http))
        return JSONResponse({"ended": engine.cancel(wanted.session, through=wanted.number)})

    @router.get("/api/models")
    async def models() -> JSONResponse:
        rows = [_model(entry, engine) for entry in engine.entries.values()]
        return JSONResponse({**engine.report(), "models": rows})

    @router.post("/api/load")
    @_answered
    async def load(http: HttpRequest) -> Response:
        name = _of(Named, await body_of(http)).model
        if name not in engine.entries:
            raise Invalid("id", f"there is no model {shown(name)}.")
        engine.load(name)
        return JSONResponse(_model(engine.entries[name], engine))


def _reading(router: APIRouter, engine: Engine) -> None:
    reader = Reader(engine)

    @router.post("/api/tokens")
    @_answered
    async def tokens(http: HttpRequest) -> Response:
        asked = _of(Named, await body_of(http))
        return JSONResponse(await asyncio.to_thread(reader.read, asked.model, asked.prompt))

    @router.post("/api/read")
    @_answered
    async def read(http: HttpRequest) -> Response:
        return JSONResponse(await asyncio.to_thread(readback.read, await http.body(), engine.entries))

    @router.post("/api/reproduce")
    @_answered
    async def reproduce(http: HttpRequest) -> Response:
        session = _session(http) if SESSION in http.headers else None
        return JSONResponse(
            await readback.reproduce(await http.body(), engine, http.is_disconnected, session)
        )

    @router.post("/api/picture")
    @_answered
    async def picture(http: HttpRequest) -> Response:
        session = _session(http)
        kept = await asyncio.to_thread(pictures.opened, await http.body())
        engine.pictures.add(session, kept)
        height, width = kept.pixels.shape[:2]
        return JSONResponse({"sha256": kept.sha256, "width": width, "height": height})


def _tabs(router: APIRouter, engine: Engine, results_file: Path | None, run_dirs: tuple[Path, ...]) -> None:
    @router.get("/api/metrics")
    async def metrics() -> JSONResponse:
        live = {**engine.metrics.summary(), "queue": len(engine.batcher)}
        return JSONResponse({"live": live, "results": await asyncio.to_thread(results.read, results_file)})

    @router.get("/api/runs")
    async def training() -> JSONResponse:
        return JSONResponse({"runs": await asyncio.to_thread(runs.read, run_dirs)})

    @router.get("/api/runs/{run}/preview/{at}")
    def preview(run: str, at: str) -> Response:
        given = run.isdecimal() and at.isdecimal() and len(run + at) < 9
        file = runs.preview(run_dirs, int(run), int(at)) if given else None
        if file is None:
            return refusal(Invalid("id", "there is no such preview."))
        return FileResponse(file, media_type="image/png")


def _page(router: APIRouter) -> None:
    files = {file.name: file.read_bytes() for file in STATIC.iterdir() if file.is_file()}
    kinds = {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".svg": "image/svg+xml",
        ".json": "application/manifest+json",
    }

    def answer(name: str) -> Response:
        if name not in files:
            return refusal(Invalid("id", "nothing is served at this address."))
        return Response(
            files[name],
            media_type=kinds[Path(name).suffix],
            headers={"cache-control": "no-cache", "content-security-policy": POLICY},
        )

    @router.get("/")
    def index() -> Response:
        return answer("index.html")

    @router.get("/favicon.ico")
    def icon() -> Response:
        return answer("icon.svg")

    # Where Gradio's page looks for it as well.
    @router.get("/manifest.json")
    def manifest() -> Response:
        return answer("manifest.json")

    @router.get("/static/{name}")
    def static(name: str) -> Response:
        return answer(name)


# The page runs its own scripts and no other, and asks nobody but this server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def _drawn(jobs: list[Job], embed: bool) -> AsyncIterator[bytes]:
    """Lines of JSON: the steps while they are drawn, every image when it is there, and what went wrong."""
    # Left as well when the client goes away.
    with awaited(jobs) as futures:
        told = None
        while True:
            _, pending = await asyncio.wait(futures, timeout=TICK)
            if not pending:
                break
            steps = max(job.progress for job in jobs)
            if steps != told:
                told = steps
                yield _line({"step": steps[0], "of": steps[1]})
        for at, future in enumerate(futures):
            try:
                yield await asyncio.to_thread(_image, at, future.result(), embed)
            except UserError as error:
                yield _line({"index": at, **error_of(error)[1]})


def _image(at: int, result: Result, embed: bool) -> bytes:
    return _line({"index": at, "png": png64(result, embed), "settings": result.settings()})


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _of(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise Invalid.of(error, kind.model_fields) from None


def _session(http: HttpRequest) -> str:
    """Whose a request is whose body is a file."""
    try:
        return _A_SESSION.validate_python(http.headers.get(SESSION, ""))
    except ValidationError as error:
        raise Invalid(SESSION, f"{SESSION} must match {error.errors()[0]['ctx']['pattern']}.") from None


def _model(entry: Entry, engine: Engine) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": entry.id, "title": entry.title, "state": entry.state, "problem": entry.problem, "about": entry.about,
    }  # fmt: skip
    if (limits := entry.limits) is not None:
        row["limits"] = {
            "kind": limits.kind,
            "steps": list(limits.steps) if limits.steps else None,
            "default_steps": limits.default_steps,
            "max_steps": limits.max_steps,
            "guidance_free": limits.guidance_free,
            "default_guidance": limits.default_guidance,
            "max_guidance": limits.max_guidance,
            "max_prompt": limits.max_prompt,
            "size": limits.size,
            "conditions": limits.conditions,
            "class_names": list(limits.class_names) if limits.class_names else None,
            "no_picture": limits.no_picture,
            "levels": limits.levels,
        }
        model = engine.models.loaded.get(entry.id) if engine.models is not None else None
        row["batch"] = list(model.sizes) if model is not None else None
    return row
