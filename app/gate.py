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
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from app.connections import Receive, Scope, Send
from app.guard import UPLOAD, parse, read, reply
from app.request import Invalid

JOIN = "/gradio_api/queue/join"
OPEN = (
    ("GET HEAD", r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"),
    ("GET HEAD", r"/(?:assets|static)(?:/[A-Za-z0-9_@-][A-Za-z0-9_.@-]*)+"),
    ("GET", r"/gradio_api/(?:info/?|app_id|queue/data|upload_progress|heartbeat/[A-Za-z0-9-]{1,64})"),
    ("GET HEAD", r"/gradio_api/file=.+"),
    ("POST", re.escape(UPLOAD) + "|" + re.escape(JOIN)),
)
OPEN = tuple((methods.split(), re.compile(pattern)) for methods, pattern in OPEN)
NAME = re.compile(r"[A-Za-z0-9-]{1,64}")  # of a tab or of an upload, both chosen by the client
QUERY = {"/gradio_api/queue/data": "session_hash", "/gradio_api/upload_progress": "upload_id"}
FILE_KEYS = {"path", "url", "meta", "_type"}
COOKIE = "stepdistill"
MAX_BROWSERS = 1000
MAX_UPLOADS = 16  # of one browser; the oldest are forgotten
MAX_NUMBER = 2**53  # beyond it JavaScript has no whole numbers


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
        self._uploads: OrderedDict[str, list[str]] = OrderedDict()

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
        field = QUERY.get(path)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if field is not None and not NAME.fullmatch((query.get(field) or [""])[0]):
            await reply(send, 400, f"{field} must be 1 to 64 letters, digits or hyphens", field=field)
            return
        browser = _cookie(scope)
        if path == JOIN:
            try:
                body = self.call(parse(await read(receive)), browser)
            except Invalid as error:
                status = 404 if error.field == "fn_index" else 400
                await reply(send, status, str(error), field=error.field)
                return
            scope, receive = _with_body(scope, receive, json.dumps(body).encode())
        if path in ("/", UPLOAD):
            await self._named(scope, receive, send, browser)
        else:
            await self.app(scope, receive, send)

    async def _named(self, scope: Scope, receive: Receive, send: Send, browser: str | None) -> None:
        """Give the browser a name, and remember under it what an upload has stored."""
        new = browser is None or len(browser) != 43
        name = secrets.token_urlsafe(32) if new else browser
        stored, ok = bytearray(), False

        async def noting(message: Any) -> None:
            nonlocal ok
            if message["type"] == "http.response.start":
                ok = message["status"] == 200
                if new:
                    value = f"{COOKIE}={name}; Path=/; HttpOnly; SameSite=Strict".encode()
                    message = {**message, "headers": [*message["headers"], (b"set-cookie", value)]}
            elif scope["path"] == UPLOAD:
                stored.extend(message.get("body", b""))
                if ok and not message.get("more_body", False):
                    self._remember(name, json.loads(stored))
            await send(message)

        await self.app(scope, receive, noting)

    def _remember(self, browser: str, paths: list[str]) -> None:
        known = self._uploads.setdefault(browser, [])
        known += paths
        del known[:-MAX_UPLOADS]
        self._uploads.move_to_end(browser)
        while len(self._uploads) > MAX_BROWSERS:
            self._uploads.popitem(last=False)

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
        if trigger is not None and not (type(trigger) is int and trigger in self.page.blocks):
            raise Invalid("trigger_id", "trigger_id names no part of this page.")
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

    def _value(self, value: Any, part: Any, browser: str | None) -> Any:
        if part.get_block_name() == "file":
            return self._upload(value, browser)
        label = getattr(part, "label", None) or part.get_block_name()
        _check_plain(value, label)
        return None if part.stateful else value

    def _upload(self, value: Any, browser: str | None) -> Any:
        """The file of a file input, by the path that this browser's upload was answered with."""
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        known = self._uploads.get(browser or "", [])
        if not isinstance(path, str) or path not in known or not self._is_served(path):
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


def _cookie(scope: Scope) -> str | None:
    """The name that this server gave the browser."""
    try:
        cookies = SimpleCookie(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


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
