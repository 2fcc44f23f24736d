"""Raw connections: odd heads, slow and silent clients, and too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time

import httpx
import pytest
from app_clients import JOIN, answered, connect, raw

from app import connections
from benchmarks import hostile


@pytest.mark.parametrize(
    "host",
    ["[127.0.0.1]evil", "127.0.0.1evil", "[127.0.0.1", "127.0.0.1]", "127.0.0.1:80:80", "localhost:x", "a@localhost",
     "localhost/", "localhost:999999", "[::1]x:1", "[]", "\xff", "local host", "evil, localhost", "localhost."],
)  # fmt: skip
def test_host_headers_that_are_no_host_are_refused(client, live, host):
    assert raw(live[0], "GET /healthz HTTP/1.1", f"host: {host}").startswith(b"HTTP/1.1 400")


def test_a_forwarded_host_is_checked_as_well(client):
    assert client.get("/config", headers={"x-forwarded-host": "evil.example"}).status_code == 400


def test_a_request_has_one_length(client, live):
    lines = ("POST /v1/images/generations HTTP/1.1", "host: localhost", "content-type: application/json")
    both = ("content-length: 5", "transfer-encoding: chunked")
    assert raw(live[0], *lines, *both, body=b"0\r\n\r\n").startswith(b"HTTP/1.1 400")
    for length in ("-1", "1e3", "99999999999999999999", "+5", "5, 6"):
        assert raw(live[0], *lines, f"content-length: {length}")[9:12] in (b"400", b"413")


@pytest.mark.parametrize(
    "line",
    ["GET /\xff HTTP/1.1", "GET /%ff%fe HTTP/1.1", "GET http://evil.example/ HTTP/1.1", "GET * HTTP/1.1",
     "GET /%00 HTTP/1.1", "GET /%0d%0aa HTTP/1.1", "GET /config?a=%ff&%00 HTTP/1.1", "nonsense",
     "GET /gradio_api/queue/data?session_hash=%ff HTTP/1.1", "GET /gradio_api/queue/data HTTP/1.1",
     "GET /gradio_api/queue/data?session_hash=a&session_hash=../b HTTP/1.1", "GET /?page=x HTTP/1.1",
     "GET /config?deep_link=../../x&page=%00 HTTP/1.1", "GET /gradio_api/info?all_endpoints=1 HTTP/1.1",
     "GET /gradio_api/heartbeat/%ed%a0%80 HTTP/1.1",
     "GET //evil.example/ HTTP/1.1", "GET /?__theme=%00 HTTP/1.1", "GET /" + "a" * 100_000 + " HTTP/1.1"],
)  # fmt: skip
def test_odd_request_lines_are_answered(client, live, line):
    assert raw(live[0], line, "host: localhost")[9:12] in (b"200", b"400", b"404")


def test_an_upgrade_is_no_door(client, live):
    upgrade = (
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-key: AAAA",
        "sec-websocket-version: 13",
    )
    assert raw(live[0], "GET /nothing HTTP/1.1", "host: localhost", *upgrade)[9:12] == b"404"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", b"GET / HTTP/1.1\r\nhost: localhost\r\n",
     b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
     b"content-type: application/json\r\n\r\n{",
     b"POST " + JOIN.encode() + b" HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n"],
)  # fmt: skip
@pytest.mark.parametrize("drip", [False, True])
def test_a_request_has_to_arrive_in_time(client, live, sent, drip):
    began = time.perf_counter()
    with connect(live[0]) as link:
        link.sendall(sent)
        with contextlib.suppress(OSError):
            while drip and time.perf_counter() - began < 4:
                link.settimeout(0.2)
                link.sendall(b"a")
                with contextlib.suppress(TimeoutError):
                    if not link.recv(65536):
                        break
        answered(link)
    assert 1 < time.perf_counter() - began < 8


def test_silent_connections_keep_nobody_out(client, live):
    with contextlib.ExitStack() as stack:
        for _ in range(256):
            stack.enter_context(connect(live[0]))
        stranger = stack.enter_context(connect(live[0], "127.0.0.2"))
        began = time.perf_counter()
        stranger.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert b"200 OK" in answered(stranger)
        assert time.perf_counter() - began < 5
        time.sleep(connections.GRACE_SECONDS + 0.1)
        # The address that holds them gets room as well: its oldest idle connection goes.
        assert client.get("/healthz", timeout=5).status_code == 200


def test_an_address_that_holds_too_much_is_told_to_wait(client, live):
    # Gradio is imported when it is first asked for.
    assert client.get("/config", timeout=240).status_code == 200
    ask = b"GET /gradio_api/heartbeat/a HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:
        links = [
            stack.enter_context(connect(live[0], "127.0.0.3")) for _ in range(connections.PER_ADDRESS + 5)
        ]
        for link in links:
            link.sendall(ask)
            link.settimeout(30)
        starts = [link.recv(4096) for link in links]
        refused = [start for start in starts if b" 503 " in start]
        assert len(refused) == 5 and all(b"retry-after: 1" in start for start in refused)
        assert client.get("/healthz", timeout=5).status_code == 200


@contextlib.contextmanager
def waiting():
    """A server whose one route answers when it is let go: its address, and what lets it go."""
    go = threading.Event()

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        while not go.is_set():
            await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    running = connections.server(app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield httpx.URL(f"http://127.0.0.1:{listener.getsockname()[1]}"), go
    finally:
        go.set()
        running.should_exit = True
        thread.join(30)


def test_who_is_refused_when_he_is_accepted_may_still_send_and_reads_the_answer():
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
    with waiting() as (url, go), contextlib.ExitStack() as stack:
        links = [stack.enter_context(connect(url)) for _ in range(connections.PER_ADDRESS)]
        for link in links:
            link.sendall(head + b"0\r\n\r\n")
        time.sleep(0.5)
        late = [stack.enter_context(connect(url)) for _ in range(20)]
        for at, link in enumerate(late):
            # One sends nothing, one a long body, the others a request as everybody's.
            with contextlib.suppress(OSError):
                link.sendall(b"" if at == 0 else head + b"0\r\n\r\n" if at > 1 else head + b"4000000\r\n\r\n")
                for _ in range(40 if at == 1 else 0):
                    link.sendall(b"0" * 100_000)
        for link in late:
            said, _, body = answered(link).partition(b"\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in said
            assert hostile.sentence(body) == "too many connections are open; try again in a moment."
        # They count no more, and another address is served as ever.
        stranger = stack.enter_context(connect(url, "127.0.0.2"))
        stranger.sendall(head + b"0\r\n\r\n")
        go.set()
        for link in (stranger, *links):
            link.settimeout(30)
            assert link.recv(4096).startswith(b"HTTP/1.1 204")


def test_a_body_that_is_too_large_is_told_so_and_not_cut_off(client, live):
    """Whose connection is closed while he still sends reads no answer."""
    for path, most in (("/api/read", 9_000_000), ("/v1/images/generations", 3_000_000)):
        assert hostile.ask(live[0].port, "POST", path, b"0" * most)[0] == 413
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (most, b"0" * most)
        said = hostile.ask(live[0].port, "POST", path, chunks, ("transfer-encoding: chunked",), False)
        assert said[0] == 413 and "larger than" in hostile.sentence(said[1])


def test_what_the_list_of_abuses_sends_gets_its_answer(client, live):
    for name, right, sent in hostile.abuses():
        status, body = hostile.ask(live[0].port, *sent)
        assert status in right, (name, status)
        assert status == 200 or hostile.sentence(body).endswith("."), (name, body[:200])


@pytest.mark.slow
def test_random_hostile_requests_are_answered(client, live):
    dice = random.Random(1)
    for _ in range(300):
        right, sent = hostile.made_up(dice)
        status, body = hostile.ask(live[0].port, *sent)
        assert status in right and b"Traceback" not in body, (sent, status)
