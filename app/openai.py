"""The routes that clients of OpenAI's image API call: models, one model, images, and images drawn from a picture."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from app.answers import body_of, form_of, png64, refusal, results_of
from app.catalog import Entry
from app.engine import Engine
from app.pictures import opened
from app.request import (
    MAX_SEED,
    Count,
    Guidance,
    Invalid,
    Name,
    Request,
    Seed,
    Strength,
    Text,
    shown,
    validate,
)
from stepdistill.errors import UserError, nearest

MAX_IMAGES = 8


class ImageCall(BaseModel):
    """The body of an image call: OpenAI's fields that mean something here, and ours."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    negative_prompt: Text = ""
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] = 1
    size: Text = "auto"
    model: Name = "student"
    response_format: Literal["b64_json"] = "b64_json"
    seed: Seed = -1
    steps: Count | None = None
    guidance_scale: Guidance | None = None


class EditCall(ImageCall):
    """The fields of a form beside its picture."""

    strength: Strength | None = None


def routes(engine: Engine) -> APIRouter:
    """/v1/models, /v1/models/ID, /v1/images/generations and /v1/images/edits."""
    router = APIRouter(prefix="/v1")
    began = int(time.time())

    @router.get("/models")
    def models() -> JSONResponse:
        rows = [_model(entry, began) for entry in engine.entries.values()]
        return JSONResponse({"object": "list", "data": rows})

    @router.get("/models/{name}")
    def model(name: str) -> JSONResponse:
        if name not in engine.entries:
            known = ", ".join(engine.entries)
            problem = f"there is no model {shown(name)}; there are {known}.{nearest(name, engine.entries)}"
            return refusal(Invalid("id", problem))
        return JSONResponse(_model(engine.entries[name], began))

    schema = {"required": True, "content": {"application/json": {"schema": ImageCall.model_json_schema()}}}

    @router.post("/images/generations", openapi_extra={"requestBody": schema})
    async def generations(http: HttpRequest) -> Response:
        try:
            count, request = wanted(await body_of(http), engine)
            jobs = engine.submit(seeds_of(request, count))
            results = await results_of(jobs, http.is_disconnected)
        except UserError as error:
            return refusal(error)
        return await asyncio.to_thread(_answer, request.model, results)

    form = {"multipart/form-data": {"schema": EditCall.model_json_schema()}}

    @router.post("/images/edits", openapi_extra={"requestBody": {"required": True, "content": form}})
    async def edits(http: HttpRequest) -> Response:
        try:
            file, fields = await form_of(http, "image")
            picture = await asyncio.to_thread(opened, file)
            count, request = wanted(fields, engine, EditCall, picture.sha256)
            jobs = engine.submit(seeds_of(request, count), picture=picture)
            results = await results_of(jobs, http.is_disconnected)
        except UserError as error:
            return refusal(error)
        return await asyncio.to_thread(_answer, request.model, results)

    return router


def wanted(
    body: dict[str, Any], engine: Engine, kind: type[ImageCall] = ImageCall, image: str = ""
) -> tuple[int, Request]:
    """How many images, and the request of the first; `image` names the picture it comes with.

    Fields this server does not know are refused, not ignored.
    """
    try:
        call = kind.model_validate(body)
    except ValidationError as error:
        raise Invalid.of(error, kind.model_fields) from None
    limits = engine.limits.get(call.model)
    if limits is not None and call.size not in ("auto", limits.size):
        raise Invalid("size", f"size must be {limits.size} (or auto), got {shown(call.size)}.")
    request = Request(**call.model_dump(exclude={"n", "size", "response_format"}), image=image)
    return call.n, validate(request, engine.limits)


def seeds_of(request: Request, count: int) -> list[Request]:
    """`count` requests that differ in their seeds: seed, seed + 1, ..."""
    return [replace(request, seed=(request.seed + at) % (MAX_SEED + 1)) for at in range(count)]


def _answer(model: str, results: list) -> Response:
    images = [
        {
            "b64_json": png64(result),
            "seed": result.request.seed,
            "steps": result.request.steps,
            "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        }
        for result in results
    ]
    return JSONResponse({"created": int(time.time()), "model": model, "data": images})


def _model(entry: Entry, began: int) -> dict[str, Any]:
    row = {
        "id": entry.id, "object": "model", "created": began, "owned_by": "local", "name": entry.title, "state": entry.state,
    }  # fmt: skip
    if entry.limits is not None:
        steps = entry.limits.steps
        row |= {
            "size": entry.limits.size,
            "steps": list(steps) if steps else None,
            "default_steps": entry.limits.default_steps,
        }
    return row
