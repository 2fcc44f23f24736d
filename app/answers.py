"""What every route does alike: errors as JSON with a status, and waiting for a job without blocking the event loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from app.batcher import Job
from app.guard import MAX_JSON, parse
from app.request import Busy, Cancelled, Invalid, shown_name
from app.result import Result
from stepdistill.errors import UserError

# Fields of a form that are numbers, which a form holds as text.
NUMBERS = ("n", "seed", "steps", "guidance_scale", "strength")


async def body_of(http: HttpRequest) -> dict[str, Any]:
    """The JSON object a request carries.

    Raises:
        Invalid: it carries none.
    """
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Invalid("content-type", "send the request as content-type application/json.")
    return parse(await http.body())


async def form_of(http: HttpRequest, file: str) -> tuple[bytes, dict[str, Any]]:
    """The file and the other fields of a form, numbers (`NUMBERS`) as numbers.

    Raises:
        Invalid: it is no such form, lacks the file, or has another.
    """
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Invalid("content-type", "send the request as a form (multipart/form-data).")
    found, fields = None, {}
    try:
        async with http.form(max_files=2, max_fields=32, max_part_size=MAX_JSON) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    fields[name] = _number(value) if name in NUMBERS else value
                # A client that may send several calls the one so.
                elif name.removesuffix("[]") == file and found is None:
                    found = await value.read()
                else:
                    raise Invalid(shown_name(name), f"{shown_name(name)} takes no file, or not another one.")
    except HTTPException as error:
        raise Invalid("body", f"the form cannot be read: {error.detail}") from None
    if found is None:
        raise Invalid(file, f"{file} is missing; send it as a file of the form.")
    return found, fields


def _number(text: str) -> Any:
    """The number that a text is; the text where it is none, or longer than any that is meant."""
    if re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]{1,20}\.[0-9]{1,20}", text) else text


def error_of(error: UserError) -> tuple[int, dict[str, Any]]:
    """The status and the body, in OpenAI's shape, that an error is answered with."""
    status, kind = 500, "server_error"
    if isinstance(error, Invalid):
        status, kind = 404 if error.field == "id" else 400, "invalid_request_error"
    elif isinstance(error, Busy):
        status, kind = 503, "busy"
    elif isinstance(error, Cancelled):
        status, kind = 409, "cancelled"
    body = {"message": str(error), "type": kind, "param": getattr(error, "field", None), "code": None}
    return status, {"error": body}


def refusal(error: UserError) -> JSONResponse:
    """The whole answer to a request that failed."""
    status, body = error_of(error)
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, Busy) else None
    return JSONResponse(body, status_code=status, headers=headers)


@contextlib.contextmanager
def awaited(jobs: list[Job]) -> Iterator[list[asyncio.Future]]:
    """The futures of jobs for the event loop. Whatever is not drawn at the end is stopped: nobody waits for it."""
    futures = [asyncio.wrap_future(job.future) for job in jobs]
    try:
        yield futures
    finally:
        for job, future in zip(jobs, futures, strict=True):
            if not future.done():
                job.cancel()
                future.cancel()
            elif not future.cancelled():
                # Looked at, or asyncio would print what nobody asked for.
                future.exception()


async def results_of(jobs: list[Job], gone: Callable[[], Awaitable[bool]]) -> list[Result]:
    """The results of the jobs of one call. When the one who asked has gone, they are stopped."""
    with awaited(jobs) as futures:
        while True:
            _, pending = await asyncio.wait(futures, timeout=0.5)
            if not pending:
                return [future.result() for future in futures]
            if await gone():
                raise Cancelled("the client went away.")


def png64(result: Result, embed: bool = True) -> str:
    """The image's file in base64. For a thread: it compresses."""
    return base64.b64encode(result.png(embed)).decode("ascii")
