"""What of Gradio a client may reach, and what it may hand to its functions: what its page and gradio_client need.

Gradio opens every path in a dict that looks like one of its files, whichever input of a handler it stands
in, and has some fifty routes of which its page and its client need ten. So here only those are open; a call is
rebuilt from the fields it may have; and a dict that looks like a file is refused: no handler takes one, and there
is nowhere to upload one to.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette._utils import get_route_path

from app.connections import Receive, Scope, Send
from app.guard import parse, read, reply
from app.request import Invalid

if TYPE_CHECKING:
    from app.later import Later

JOIN = "/gradio_api/queue/join"
STREAM = "/gradio_api/queue/data"
CALLS = (
    ("GET HEAD", r"/config"),
    ("GET", r"/gradio_api/(?:info/?|queue/data|heartbeat/[A-Za-z0-9-]{1,64})"),
    ("GET HEAD", r"/gradio_api/file=.+"),
    ("POST", re.escape(JOIN)),
)
# Of the page: itself, and files of the installed package by names that neither climb nor hide.
PAGE = (
    ("GET HEAD", r"/"),
    ("GET", r"/(?:gradio_api/)?theme\.css|/gradio_api/startup-events"),
    ("GET", r"/(?:assets|static)(?:/[A-Za-z0-9_@-][A-Za-z0-9_.@-]*)+"),
)
# Its scripts stand in the document, and it makes functions of text. None come from elsewhere, and it asks nobody else.
POLICY = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' blob: data:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; base-uri 'self'; "
    b"form-action 'none'; frame-ancestors 'none'"
)
# Of a browser's tab, which the tab has chosen.
NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
# The one field of a query that a route reads.
QUERY = {STREAM: "session_hash"}
FILE_KEYS = {"path", "url", "meta", "_type"}
# Beyond it JavaScript has no whole numbers.
MAX_NUMBER = 2**53


class Gate:
    """An ASGI application in front of Gradio's own.

    Args:
        later: gives the page and Gradio's application once they are needed.
        page: let through what Gradio's page needs as well, and not the calls alone.
        cache: the directory of served files; None is Gradio's own.
    """

    def __init__(self, later: Later, page: bool = False, cache: str | Path | None = None) -> None:
        self.later = later
        routes = (*CALLS, *PAGE) if page else CALLS
        self.open = [(methods.split(), re.compile(pattern)) for methods, pattern in routes]
        cache = cache or os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio"
        self.cache = Path(cache).resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = get_route_path(scope), scope["method"]
        if not any(method in methods and pattern.fullmatch(path) for methods, pattern in self.open):
            await reply(send, 404, "nothing is served at this address")
            return
        if path.startswith("/gradio_api/file=") and not self._is_served(path.partition("=")[2]):
            await reply(send, 404, "there is no such file")
            return
        try:
            scope = {**scope, "query_string": _query(path, scope["query_string"])}
            if path == JOIN:
                page, _ = await self.later.get()
                body = call(page, parse(await read(receive)))
                scope, receive = _with_body(scope, receive, json.dumps(body).encode())
        except Invalid as error:
            await reply(send, 404 if error.field == "fn_index" else 400, str(error), field=error.field)
            return
        page, app = await self.later.get()
        if path == STREAM:
            session = scope["query_string"].decode().partition("=")[2]
            await _stream(app, scope, receive, send, lambda: page.draws.end(session))
        else:
            await app(scope, receive, _with_policy(send) if path == "/" else send)

    def _is_served(self, path: str) -> bool:
        """Whether `path` names a file of the cache: cache/hash/name, with nothing to climb or follow."""
        whole = Path(path)
        if ".." in whole.parts or whole.parent.parent != self.cache:
            return False
        return whole.resolve() == whole and whole.is_file()


def _with_policy(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"content-security-policy", POLICY)]}
        await send(message)

    return sending


async def _stream(app: Any, scope: Scope, receive: Receive, send: Send, gone: Callable[[], None]) -> None:
    """Gradio's stream of answers. `gone` is called where the client goes away, of which Gradio tells no function."""
    started, ended, sized, asked, left = False, False, False, False, asyncio.Event()

    async def noting(message: Any) -> None:
        nonlocal started, ended, sized
        if message["type"] == "http.response.start":
            started = True
            sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
        else:
            ended = not message.get("more_body", False)
        await send(message)

    async def once() -> Any:
        nonlocal asked
        if asked:
            await left.wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()
        gone()

    watching = asyncio.ensure_future(watch())
    try:
        await app(scope, once, noting)
    except Exception:
        # Gradio tells a tab that it does not know so, and then raises: that is no fault of the server's.
        if not started:
            raise
        # One that said its length and is cut off has no end that can be sent: its connection is closed.
        if not ended and not sized:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        watching.cancel()


# A call of a function ------------------------------------------------------------------------------------


def call(page: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The call in `body`, rebuilt from what its handler takes.

    Raises:
        Invalid: a field is missing, unknown, out of range, or holds a file.
    """
    session, index, data = body.get("session_hash"), body.get("fn_index"), body.get("data")
    if not isinstance(session, str) or not NAME.fullmatch(session):
        raise Invalid("session_hash", "session_hash must be 1 to 64 letters, digits or hyphens.")
    # By type, as True is an int as well.
    if type(index) is not int or index not in page.fns:
        raise Invalid("fn_index", "fn_index names no function of this page.")
    handler = page.fns[index]
    if not isinstance(data, list) or len(data) != len(handler.inputs):
        raise Invalid("data", f"data must be a list of {len(handler.inputs)} values.")
    trigger = body.get("trigger_id")
    if trigger is not None and not (type(trigger) is int and trigger in _triggers(page, handler)):
        raise Invalid("trigger_id", "trigger_id names no part of this page that calls this function.")
    return {
        "session_hash": session,
        "fn_index": index,
        "data": [_value(value, part) for value, part in zip(data, handler.inputs, strict=True)],
        "trigger_id": trigger,
        # What else a browser says of a click is left out: no handler needs it.
        "event_data": None,
    }


def _triggers(page: Any, handler: Any) -> set[int | None]:
    """The parts whose events call a handler, also through one that it follows.

    The page itself, whose loading is an event, is one of them.
    """
    while handler.trigger_after in page.fns:
        handler = page.fns[handler.trigger_after]
    return {part for part, _ in handler.targets}


def _value(value: Any, part: Any) -> Any:
    _check_plain(value, getattr(part, "label", None) or part.get_block_name())
    return None if part.stateful else value


def _check_plain(value: Any, label: str) -> None:
    """Refuse what looks like a file, or is no number of JavaScript, at any depth of a value."""
    if isinstance(value, dict):
        if FILE_KEYS & value.keys():
            raise Invalid("data", f"{label} takes no file.")
        for inner in value.values():
            _check_plain(inner, label)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, label)
    elif isinstance(value, (int, float)) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise Invalid("data", f"{label} is a number beyond {MAX_NUMBER}.")


def _query(path: str, query: bytes) -> bytes:
    """The query of a request, rebuilt from what its route reads: Gradio's own routes read a good deal more."""
    field = QUERY.get(path)
    if field is None:
        return b""
    values = parse_qs(query.decode("latin-1")).get(field, [])
    if len(values) != 1 or not NAME.fullmatch(values[0]):
        raise Invalid(field, f"{field} must be 1 to 64 letters, digits or hyphens.")
    return f"{field}={values[0]}".encode()


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The request with another body in the place of its own, which has been read."""
    replaced = (b"content-length", b"transfer-encoding", b"content-type")
    kept = [pair for pair in scope["headers"] if pair[0].lower() not in replaced]
    length = (b"content-length", str(len(body)).encode())
    scope = {**scope, "headers": [*kept, length, (b"content-type", b"application/json")]}
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return scope, again
