"""What of Gradio a client may reach, and what it may hand to the page's handlers.

Gradio opens every path in a dict that looks like one of its files, whichever input of a handler it stands
in, and has some fifty routes of which the page needs a dozen. So here only those are open; a call is rebuilt
from the fields it may have; a dict that looks like a file is refused but in a file input; and there it has
to name what the same browser has uploaded. A browser is known by a cookie.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from app.connections import Receive, Scope, Send
from app.guard import UPLOAD, parse, read, reply
from app.request import Invalid
from app.uploads import Uploads

JOIN = "/gradio_api/queue/join"
STREAM = "/gradio_api/queue/data"
PROGRESS = "/gradio_api/upload_progress"
OPEN = (
    ("GET HEAD", r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"),
    ("GET HEAD", r"/(?:assets|static)(?:/[A-Za-z0-9_@-][A-Za-z0-9_.@-]*)+"),
    ("GET", r"/gradio_api/(?:info/?|app_id|queue/data|upload_progress|heartbeat/[A-Za-z0-9-]{1,64})"),
    ("GET HEAD", r"/gradio_api/file=.+"),
    ("POST", re.escape(UPLOAD) + "|" + re.escape(JOIN)),
)
OPEN = tuple((methods.split(), re.compile(pattern)) for methods, pattern in OPEN)
# Of a browser's tab, which the tab has chosen.
NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
# The one field of a query that a route reads.
QUERY = {STREAM: "session_hash"}
FILE_KEYS = {"path", "url", "meta", "_type"}
COOKIE = "stepdistill"
# Beyond it JavaScript has no whole numbers.
MAX_NUMBER = 2**53


class Gate:
    """ASGI middleware around Gradio's own application.

    Args:
        app: Gradio's application.
        page: the `gr.Blocks` it serves.
        cache: the directory of uploaded and served files.
    """

    def __init__(self, app: Any, page: Any, cache: str | Path) -> None:
        self.app, self.page = app, page
        self.cache = Path(cache).resolve()
        self.uploads = Uploads(self.cache)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        if not any(method in methods and pattern.fullmatch(path) for methods, pattern in OPEN):
            await reply(send, 404, "nothing is served at this address")
            return
        if path.startswith("/gradio_api/file=") and not self._is_served(path.partition("=")[2]):
            await reply(send, 404, "there is no such file")
            return
        browser = _cookie(scope)
        try:
            if path == UPLOAD:
                await self._upload(scope, receive, send, browser)
                return
            scope = {**scope, "query_string": _query(scope)}
            if path == JOIN:
                body = self.call(parse(await read(receive)), browser)
                scope, receive = _with_body(scope, receive, json.dumps(body).encode())
        except Invalid as error:
            await reply(send, 404 if error.field == "fn_index" else 400, str(error), field=error.field)
            return
        if path == PROGRESS:
            await _answer(send, b'data: {"msg": "done"}\n\n', b"text/event-stream", [])
        elif path == STREAM:
            await self._stream(scope, receive, send)
        else:
            await self.app(scope, receive, _naming(send) if path == "/" and browser is None else send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            # Gradio tells a tab that it does not know so, and then raises: that is no fault of the server's.
            if not started:
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _upload(self, scope: Scope, receive: Receive, send: Send, browser: str | None) -> None:
        name = browser or secrets.token_urlsafe(32)
        path = await self.uploads.store(scope, receive, name)
        headers = [] if browser else [_set_cookie(name)]
        await _answer(send, json.dumps([path]).encode(), b"application/json", headers)

    def _is_served(self, path: str) -> bool:
        """Whether `path` names a file of the cache: cache/hash/name, with nothing to climb or follow."""
        whole = Path(path)
        if ".." in whole.parts or whole.parent.parent != self.cache:
            return False
        return whole.resolve() == whole and whole.is_file()

    # A call of a handler ------------------------------------------------------------------------------------

    def call(self, body: dict[str, Any], browser: str | None) -> dict[str, Any]:
        """The call in `body`, rebuilt from what its handler takes.

        Raises:
            Invalid: a field is missing, unknown, out of range, or holds a file where there is no file input.
        """
        session, index, data = body.get("session_hash"), body.get("fn_index"), body.get("data")
        if not isinstance(session, str) or not NAME.fullmatch(session):
            raise Invalid("session_hash", "session_hash must be 1 to 64 letters, digits or hyphens.")
        # By type, as True is an int as well.
        if type(index) is not int or index not in self.page.fns:
            raise Invalid("fn_index", "fn_index names no function of this page.")
        handler = self.page.fns[index]
        if not isinstance(data, list) or len(data) != len(handler.inputs):
            raise Invalid("data", f"data must be a list of {len(handler.inputs)} values.")
        trigger = body.get("trigger_id")
        if trigger is not None and not (type(trigger) is int and trigger in self._triggers(handler)):
            raise Invalid("trigger_id", "trigger_id names no part of this page that calls this function.")
        return {
            "session_hash": session,
            "fn_index": index,
            "data": [
                self._value(value, part, browser) for value, part in zip(data, handler.inputs, strict=True)
            ],
            "trigger_id": trigger,
            # What else a browser says of a click (the file that was dropped, the image that was clicked) is
            # left out: no handler needs it.
            "event_data": _chosen(body.get("event_data")) if handler.collects_event_data else None,
        }

    def _triggers(self, handler: Any) -> set[int | None]:
        """The parts whose events call a handler, also through one that it follows.

        The page itself, whose loading is an event, is one of them.
        """
        while handler.trigger_after in self.page.fns:
            handler = self.page.fns[handler.trigger_after]
        return {part for part, _ in handler.targets}

    def _value(self, value: Any, part: Any, browser: str | None) -> Any:
        if part.get_block_name() == "file":
            return self._file(value, browser)
        label = getattr(part, "label", None) or part.get_block_name()
        _check_plain(value, label)
        return None if part.stateful else value

    def _file(self, value: Any, browser: str | None) -> Any:
        """The file of a file input, by the path that this browser's upload was answered with."""
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or not self.uploads.belongs(path, browser) or not self._is_served(path):
            raise Invalid("data", "a file input takes only what this browser has uploaded.")
        name = os.path.basename(path)
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


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


def _chosen(event: Any) -> dict[str, Any]:
    """Of a click on an image: its place in the gallery."""
    index = event.get("index") if isinstance(event, dict) else None
    if type(index) is not int or not 0 <= index < MAX_NUMBER:
        raise Invalid("event_data", "event_data must hold the index of the image that was chosen.")
    return {"index": index, "value": None}


def _query(scope: Scope) -> bytes:
    """The query of a request, rebuilt from what its route reads: Gradio's own routes read a good deal more."""
    field = QUERY.get(scope["path"])
    if field is None:
        return b""
    values = parse_qs(scope["query_string"].decode("latin-1")).get(field, [])
    if len(values) != 1 or not NAME.fullmatch(values[0]):
        raise Invalid(field, f"{field} must be 1 to 64 letters, digits or hyphens.")
    return f"{field}={values[0]}".encode()


def _cookie(scope: Scope) -> str | None:
    """The name that this server gave the browser; None where it has none yet."""
    try:
        cookies = SimpleCookie(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
    except CookieError:
        return None
    value = cookies[COOKIE].value if COOKIE in cookies else ""
    return value if re.fullmatch(r"[A-Za-z0-9_-]{43}", value) else None


def _set_cookie(name: str) -> tuple[bytes, bytes]:
    return b"set-cookie", f"{COOKIE}={name}; Path=/; HttpOnly; SameSite=Strict".encode()


def _naming(send: Send) -> Send:
    """`send` that also gives the browser a name."""

    async def naming(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], _set_cookie(secrets.token_urlsafe(32))]}
        await send(message)

    return naming


async def _answer(send: Send, body: bytes, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    own = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


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
