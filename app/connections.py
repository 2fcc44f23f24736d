"""Connections: how long one may take to send a request, and how many an address may hold.

uvicorn waits for ever for the first byte of a connection, for the rest of a request and for a client that
reads no answer. Here a request has to arrive in `RECEIPT_SECONDS` (longer in proportion to a body it
announces), a client has to take what it asked for within `STALL_SECONDS`, and one address cannot crowd out
the others: past `PER_ADDRESS` connections its oldest idle one is closed in favour of the new, or the new one
is answered 503 where all of them are at work: as soon as it is accepted, by bytes that are there already.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

RECEIPT_SECONDS = 15.0
# Bytes per second, at least, of a body.
RECEIPT_RATE = 100_000
STALL_SECONDS = 60.0
PER_ADDRESS = 128
IN_ALL = 1024
DRAIN_SECONDS = 9
# A connection that has just opened had no time to send its request, and is not idle.
GRACE_SECONDS = 1.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Seconds in which a client that was refused may still send.
LINGER_SECONDS = 2.0
LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_CROWDED = b'{"error":{"message":"too many connections are open; try again in a moment.","type":"busy","param":null,"code":null}}'
CROWDED = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_CROWDED), _CROWDED)
)


def server(app: Any, on_stop: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """The server of `app`, with the deadlines and caps of this module.

    on_stop: called at once when a signal asks it to end; what is under way then has `DRAIN_SECONDS`.
    """
    _allow_open_files(4 * IN_ALL)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=30,
    )
    return Server(config, on_stop)


class Server(uvicorn.Server):
    """uvicorn's, which says when it begins to stop."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._on_stop()
        super().handle_exit(sig, frame)


class Connection(H11Protocol):
    """One connection of a client, with a clock on it.

    It is idle before its first request, between two, and while one is still arriving.
    """

    idle_since: float | None = None
    _address = ""
    # There was no room for it, and it has been told so; it counts no more.
    _refused = False
    _timed: Any = None
    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._address = _network(self.client[0]) if self.client else ""
        self.idle_since = time.monotonic()
        self._expect(RECEIPT_SECONDS)
        held = [other for other in self.connections if not other._refused]
        mine = [other for other in held if other._address == self._address]
        if not _make_room(mine, PER_ADDRESS) or not _make_room(held, IN_ALL):
            self._refuse()
            if len(self.connections) > 2 * IN_ALL:
                self.abort()

    def data_received(self, data: bytes) -> None:
        # Of one that was refused it is dropped: who still sends when a connection closes reads no answer.
        if not self._refused:
            super().data_received(data)
            self._watch()

    def _refuse(self) -> None:
        """Answer that there is no room, before anything of a request is there, and read on until the client has closed."""
        self._refused = True
        self.transport.write(CROWDED)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._expect(LINGER_SECONDS)

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for clock in (self._deadline, self._stall, self.timeout_keep_alive_task):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        # Out of the set now and not when the loop comes to `connection_lost`, so that it is counted no more.
        self.connections.discard(self)
        self.transport.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered as if it had asked for no upgrade."""

    def _watch(self) -> None:
        """Set the clock by what the connection is doing now."""
        cycle = self.cycle
        asked = cycle is not None and not cycle.response_complete
        if asked and not cycle.more_body:
            self.idle_since = None
            self._expect(None)
            return
        if self.idle_since is None:
            self.idle_since = time.monotonic()
        if asked and cycle is not self._timed:
            # The head of a request is there: from now on its body is waited for.
            self._timed = cycle
            length = dict(self.headers).get(b"content-length", b"0")
            announced = int(length) if length.isdigit() and len(length) < 9 else 0
            self._expect(RECEIPT_SECONDS + announced / RECEIPT_RATE)
        elif self._deadline is None and self.timeout_keep_alive_task is None:
            self._expect(RECEIPT_SECONDS)

    def _expect(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._deadline = None
        if not self._refused and (self.cycle is None or not self.cycle.response_started):
            self.transport.write(LATE)
        self.connections.discard(self)
        self.transport.close()


def _allow_open_files(count: int) -> None:
    """Let the process hold that many files and connections, where the system permits it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _make_room(held: list[Connection], most: int) -> bool:
    """Close the oldest idle connections of `held` until `most` are left, and say whether that was possible."""
    if len(held) <= most:
        return True
    since = time.monotonic() - GRACE_SECONDS
    idle = [other for other in held if other.idle_since is not None and other.idle_since < since]
    idle.sort(key=lambda other: other.idle_since)
    for other in idle[: max(0, len(held) - most)]:
        other.abort()
    return len(held) - len(idle) <= most


def _network(address: str) -> str:
    """What counts as one address: of IPv6 the first 64 bits, which one customer is given whole."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
