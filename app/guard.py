"""What every request has to pass before a route sees it.

What uvicorn, Gradio and FastAPI leave open is closed here: the Host header (DNS rebinding), the Origin of a
POST (cross-site forms), a password, the framing and the size of a body, JSON that no handler can use,
and the headers against framing and sniffing in a browser.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from app import strict_json
from app.connections import Receive, Scope, Send
from app.png import MAX_FILE
from app.request import Busy, Invalid

MAX_JSON = 64 * 1024
MAX_DEPTH = 16
# Bytes of a body that is too large which are read and dropped before it is refused.
MAX_PASSED = 32 * 1024 * 1024
# Routes whose body is a file.
FILES = ("/api/read", "/api/reproduce", "/api/picture", "/v1/images/edits")
# Routes that draw for nobody in particular: a session's newer request may take the place of its older one.
DRAWN = ("/v1/images/generations", "/v1/images/edits")
HEALTH = "/healthz"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Wrong passwords of one address in `LOCK_SECONDS` before it has to wait, and addresses that are remembered.
MAX_WRONG = 5
LOCK_SECONDS = 60.0
MAX_REMEMBERED = 4096
HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
HOST = re.compile(
    r"(?:\[(?P<bracketed>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_.-]+))(?::\d{1,5})?|(?P<bare>[0-9a-f:]+)"
)


class TooLarge(Exception):
    """A body exceeds its cap."""


class Gone(Exception):
    """The client closed the connection before its request was complete."""


class Guard:
    """ASGI middleware around the whole server.

    Args:
        hosts: names this server is reached by, without port.
        any_address: also accept a Host that is an IP address.
        account: "USER:PASSWORD" asked of every request but those for /healthz; None asks for none.
        full: says why no image can be drawn now; then a request for one (`DRAWN`) is refused before it is read.
    """

    def __init__(
        self,
        app: Any,
        hosts: Iterable[str] = LOOPBACK,
        any_address: bool = False,
        account: str | None = None,
        full: Callable[[], Busy | None] = lambda: None,
    ) -> None:
        self.app, self.full = app, full
        self.hosts = {host.lower() for host in hosts}
        self.any_address = any_address
        self.door = None if account is None else Password(account)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Nothing here speaks WebSocket.
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        cap = MAX_FILE + MAX_JSON if scope["path"] in FILES else MAX_JSON
        refusal = self._refusal(scope, headers, cap)
        if refusal is not None:
            if refusal[0] == 413 and _length(headers) <= MAX_PASSED:
                await _passed_over(receive)
            await reply(send, *refusal)
            return
        busy = self.full() if scope["path"] in DRAWN and scope["method"] == "POST" else None
        if busy is not None:
            if MAX_JSON < _length(headers) <= MAX_PASSED:
                await _passed_over(receive)
            after = (b"retry-after", str(busy.retry_after).encode())
            await reply(send, 503, str(busy), [after], kind="busy")
            return
        # No route needs a part of a file, and Gradio answers an odd Range with 500.
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"range"]
        await self._pass_on(scope, receive, send, cap)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, cap: int) -> None:
        received, complete, started = 0, False, False
        failure: Exception | None = None

        async def counted() -> MutableMapping[str, Any]:
            nonlocal received, complete, failure
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                failure = Gone()
                raise failure
            received += len(message.get("body", b""))
            complete = complete or not message.get("more_body", False)
            # Counted, as a chunked body does not say its length.
            if received > cap:
                failure = TooLarge()
                raise failure
            return message

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            # What a route makes of the failure is passed over; our own answer follows.
            if failure is not None and not started:
                return
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message.get("headers", [])}
                extra = [pair for pair in HEADERS if pair[0] not in present]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except TooLarge as error:
            failure = error
        except Exception:
            if failure is None:
                raise
        if isinstance(failure, TooLarge) and not started:
            if not complete:
                await _passed_over(receive)
            await reply(send, *_too_large(cap))

    def _refusal(self, scope: Scope, headers: dict[str, str], cap: int) -> tuple[Any, ...] | None:
        """Status, sentence and further headers, or None where the request may pass."""
        for field in ("host", "x-forwarded-host"):
            if not self._is_ours(headers.get(field, headers.get("host", ""))):
                return 400, "this Host name is not served here"
        if "transfer-encoding" in headers and "content-length" in headers:
            return 400, "a request has Content-Length or Transfer-Encoding, not both"
        if _unprintable(scope["path"]):
            return 404, "nothing is served at this address"
        if _length(headers) > cap:
            return _too_large(cap)
        if self.door is not None and scope["path"] != HEALTH:
            address = (scope.get("client") or ("",))[0]
            refusal = self.door.refusal(headers.get("authorization"), address)
            if refusal is not None:
                return refusal
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1].lower() != headers["host"].lower():
            return 403, "requests from other sites are refused"
        if headers.get("sec-fetch-site") == "cross-site":
            return 403, "requests from other sites are refused"
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server.

        Starlette's TrustedHostMiddleware would take neither any address (needed at 0.0.0.0) nor the forwarded
        host, from which Gradio builds its links, and answers in another form.
        """
        match = HOST.fullmatch(host.strip().lower())
        if match is None:
            return False
        name = match["bracketed"] or match["name"] or match["bare"]
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        # DNS rebinding, which the check is for, always comes with a name.
        return self.any_address


class Password:
    """HTTP Basic authentication with one account, slowed down after `MAX_WRONG` wrong tries of an address."""

    def __init__(self, account: str) -> None:
        self._account = account.encode()
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def refusal(self, authorization: str | None, address: str) -> tuple[Any, ...] | None:
        """None where the password is right, else status, sentence and headers."""
        now = time.monotonic()
        times = self._wrong.get(address, deque())
        while times and times[0] < now - LOCK_SECONDS:
            times.popleft()
        if len(times) >= MAX_WRONG:
            wait = str(int(times[0] + LOCK_SECONDS - now) + 1).encode()
            return 429, "too many wrong passwords; try again later", [(b"retry-after", wait)]
        ask = [(b"www-authenticate", b'Basic realm="stepdistill", charset="UTF-8"')]
        if authorization is None:
            return 401, "a user name and a password are needed", ask
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            given = b""
        if hmac.compare_digest(given, self._account):
            self._wrong.pop(address, None)
            return None
        times.append(now)
        self._wrong[address] = times
        self._wrong.move_to_end(address)
        if len(self._wrong) > MAX_REMEMBERED:
            self._wrong.popitem(last=False)
        return 401, "the user name or the password is wrong", ask


# Bodies and answers -----------------------------------------------------------------------------------------


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Invalid: it holds none, or one that `strict_json` refuses.
    """
    try:
        return strict_json.loads(raw, MAX_DEPTH)
    except ValueError as error:
        raise Invalid("body", f"the body cannot be read: {error}.") from None


async def read(receive: Receive) -> bytes:
    """The whole body of a request."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _passed_over(receive: Receive) -> None:
    """Let the rest of a body come, up to `MAX_PASSED` bytes: who still sends when the connection closes reads no answer."""
    left, more = MAX_PASSED, True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message.get("more_body", False)


async def reply(
    send: Send,
    status: int,
    message: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
    field: str | None = None,
    kind: str = "refused",
) -> None:
    """Refuse a request in one sentence and close the connection, as its body may be unread."""
    error = {"message": message.rstrip(".") + ".", "type": kind, "param": field, "code": None}
    body = json.dumps({"error": error}).encode()
    own = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    start = {"type": "http.response.start", "status": status, "headers": [*own, *headers, *HEADERS]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _length(headers: dict[str, str]) -> float:
    """Of the body, as the head says it; infinite where that is no number."""
    said = headers.get("content-length", "0")
    return int(said) if said.isascii() and said.isdigit() and len(said) <= 18 else math.inf


def _too_large(cap: int) -> tuple[int, str]:
    return 413, f"the body is larger than the {cap} bytes allowed"


def _unprintable(path: str) -> bool:
    return any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in path)
