"""Hostile clients against the whole server, over real connections: nothing is read, nothing stands still."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import pathlib
import re
import socket
import threading
import time

import httpx
import pytest
from app_fakes import CANARY, engine_of, served
from starlette.testclient import TestClient

from app import connections, guard
from app.http import create_app

JOIN = "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The server's address, its log and its temporary directory."""
    folder = tmp_path_factory.mktemp("served")
    with served(folder, receipt=1.5) as (url, log):
        yield httpx.URL(url), log, folder


@pytest.fixture()
def client(live):
    """A client that asks after each test whether the server still answers, without a traceback in its log."""
    url, log, _ = live
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client
        assert client.get("/healthz").status_code == 200
    assert "Traceback" not in log.read_text()


def stream(client, session):
    """What the handlers of a tab have answered."""
    text = ""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            text += line
            if "close_stream" in line:
                break
    return text


def handlers(client):
    """Index and number of inputs of every function of the page, and the position of its file input."""
    config = client.get("/config").json()
    kinds = {part["id"]: part["type"] for part in config["components"]}
    return [(d["id"], [kinds[part] for part in d["inputs"]]) for d in config["dependencies"]]


def sentence(answer):
    message = answer.json()["error"]["message"]
    assert message.endswith(".") and "\n" not in message and len(message) < 200
    return message


# Files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bait(tmp_path_factory):
    """Everything that leads to a secret: paths, links, and a web server that notes who asks."""
    folder = tmp_path_factory.mktemp("bait")
    file = folder / "secret.png"
    file.write_text(CANARY)
    (folder / "link.png").symlink_to(file)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CANARY.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [
        str(file),
        str(folder / "link.png"),
        os.path.relpath(file),
        f"{folder}/../{folder.name}/secret.png",
        "/proc/self/environ",
        f"file://{file}",
        f"http://127.0.0.1:{server.server_port}/secret.png",
    ]
    assert not asked
    server.shutdown()


def disguises(path):
    """Values that Gradio would take for the file at `path`."""
    meta = {"_type": "gradio.FileData"}
    whole = {"path": path, "meta": meta}
    return [
        whole,
        {"path": path},
        {"url": path, "path": path, "orig_name": "a.png", "size": 9, "is_stream": False, "meta": meta},
        [whole],
        {"value": whole},
        [[{"image": whole, "caption": None}]],
    ]


def nowhere(live):
    """No file of the server's temporary directory holds the secret."""
    _, log, folder = live
    files = [path for path in folder.rglob("*") if path.is_file()]
    return log in files and not any(CANARY.encode() in path.read_bytes() for path in files)


def test_no_input_of_any_function_opens_a_path(client, live, bait):
    tried = 0
    for index, inputs in handlers(client):
        for at in range(len(inputs)):
            for value in [value for path in bait for value in disguises(path)]:
                data = [value if i == at else None for i in range(len(inputs))]
                answer = client.post(JOIN, json={"fn_index": index, "session_hash": "a", "data": data})
                assert answer.status_code == 400, (index, at, value)
                assert CANARY not in answer.text and sentence(answer)
                tried += 1
    assert tried > 1000 and nowhere(live)


@pytest.mark.parametrize("field", ["event_data", "trigger_id", "session_hash", "fn_index", "data", "more"])
def test_no_other_field_of_a_call_opens_a_path(client, live, bait, field):
    sessions = []
    for index, inputs in handlers(client):
        for at, path in enumerate(bait):
            for value in [disguises(path)[2], path]:
                session = f"{field.replace('_', '')}-{index}-{at}-{len(sessions)}"
                body = {"fn_index": index, "session_hash": session, "data": [None] * len(inputs)}
                answer = client.post(JOIN, json={**body, field: value})
                assert answer.status_code < 500 and CANARY not in answer.text
                if answer.status_code == 200:
                    assert field in ("event_data", "more")  # which are left out
                    sessions.append(session)
                else:
                    assert sentence(answer)
        for session in sessions:
            assert CANARY not in stream(client, session)
        sessions.clear()
    assert nowhere(live)


def test_no_address_opens_a_path(client, live, bait):
    for path in [*bait, "/dev/zero", "//etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd%00.png"]:
        for before in ("file=", "file/", "proxy=", "stream/", "custom_component/"):
            answer = client.get(f"/gradio_api/{before}{path}")
            assert answer.status_code in (400, 404) and CANARY not in answer.text
        for before in ("static/", "assets/", "svelte/", "gradio_api/"):
            assert client.get(f"/{before}{path}").status_code in (400, 404)
    for path in live[2].rglob("*"):  # the log and the directories beside the cache
        assert client.get(f"/gradio_api/file={path}").status_code in (404, 200)
    assert client.get(f"/gradio_api/file={live[1]}").status_code == 404


def test_a_file_input_takes_what_the_same_browser_uploaded_and_nothing_else(client, live):
    index, inputs = next((i, kinds) for i, kinds in handlers(client) if "file" in kinds)
    assert inputs == ["file"]

    def drop(asker, path, session):
        value = {"path": path, "meta": {"_type": "gradio.FileData"}}
        return asker.post(JOIN, json={"fn_index": index, "session_hash": session, "data": [value]})

    (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", b"no image", "image/png")}).json()
    assert drop(client, path, "mine").status_code == 200
    assert "not a PNG" in stream(client, "mine")
    with httpx.Client(base_url=live[0]) as stranger:
        stranger.get("/")
        assert stranger.cookies and "uploaded" in sentence(drop(stranger, path, "theirs"))
        stranger.cookies.clear()
        assert drop(stranger, path, "nobodys").status_code == 400
    secret = live[2] / "beside.png"
    secret.write_text(CANARY)
    os.remove(path)
    os.symlink(secret, path)
    assert drop(client, path, "linked").status_code == 400
    assert client.get(f"/gradio_api/file={path}").status_code == 404
    secret.unlink()


def test_an_endless_file_stops_nobody(client):
    began = time.perf_counter()
    for index, inputs in handlers(client):
        for at in range(len(inputs)):
            data = [disguises("/dev/zero")[2] if i == at else None for i in range(len(inputs))]
            with contextlib.suppress(httpx.ReadTimeout):
                client.post(JOIN, json={"fn_index": index, "session_hash": "z", "data": data}, timeout=5)
            assert client.get("/healthz", timeout=5).status_code == 200
    assert client.get("/gradio_api/file=/dev/zero", timeout=5).status_code == 404
    assert time.perf_counter() - began < 60


def test_the_page_works_through_the_gate(client):
    page = client.get("/")
    assert page.status_code == 200 and "HttpOnly; SameSite=Strict" in page.headers["set-cookie"].replace(
        "; Path=/", ""
    )
    for path in ("/config", "/theme.css", "/gradio_api/info", "/gradio_api/app_id", "/favicon.ico"):
        assert client.get(path).status_code == 200, path
    script = page.text.split('src="./assets/')[1].split('"')[0]
    assert client.get(f"/assets/{script}").status_code == 200
    data = ["a red circle", 1, 3, False, True, "", 7.5, None]
    call = {"fn_index": 0, "session_hash": "tab", "data": data, "event_data": None, "trigger_id": None}
    assert client.post(JOIN, json=call).status_code == 200
    said = stream(client, "tab")
    image = said.split('"url":"')[1].split('"')[0]
    assert client.get(image).content.startswith(b"\x89PNG")
    assert client.get("/gradio_api/upload_progress?upload_id=a").text == 'data: {"msg": "done"}\n\n'
    assert '"success":true' in said and client.head(image).status_code == 200


# Calls and routes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/run/make"), ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/call/make"), ("POST", "/gradio_api/call/v2/make"), ("GET", "/gradio_api/call/make/1"),
        ("POST", "/gradio_api/component_server"), ("POST", "/gradio_api/stream/1"), ("POST", "/gradio_api/reset"),
        ("POST", "/gradio_api/cancel"), ("GET", "/gradio_api/deep_link"), ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/process_recording"), ("GET", "/monitoring"), ("GET", "/monitoring/summary"),
        ("GET", "/gradio_api/mcp/sse"), ("POST", "/gradio_api/mcp/"), ("GET", "/gradio_api/openapi.json"),
        ("GET", "/openapi.json"), ("GET", "/gradio_api/startup-events"), ("GET", "/gradio_api/queue/status"),
        ("GET", "/gradio_api/token"), ("GET", "/gradio_api/runs"), ("GET", "/gradio_api/profiling/traces"),
        ("POST", "/login"), ("GET", "/logout"), ("GET", "/pwa_icon/192"), ("GET", "/gradio_api/dev/reload"),
        ("DELETE", "/"), ("PUT", "/gradio_api/upload"), ("OPTIONS", "/config"), ("TRACE", "/"),
        ("GET", "/gradio_api/heartbeat/a%2fb"), ("GET", "/static/..%2f..%2froutes.py"), ("GET", "/assets/%00"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(client, method, path):
    answer = client.request(method, path, json={"data": []} if method == "POST" else None)
    assert answer.status_code == 404 and sentence(answer)


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (404, {"fn_index": -1}), (404, {"fn_index": 10_000}), (404, {"fn_index": None}), (404, {"fn_index": True}),
        (404, {"fn_index": "0"}), (404, {"fn_index": 10**400}), (404, {"fn_index": 0.0}), (404, {"fn_index": [0]}),
        (400, {"data": []}), (400, {"data": [None] * 9}), (400, {"data": {}}), (400, {"data": None}),
        (400, {"session_hash": None}), (400, {"session_hash": ""}), (400, {"session_hash": "a/../b"}),
        (400, {"session_hash": "x" * 65}), (400, {"session_hash": 3}), (400, {"session_hash": "\ud800"}),
        (400, {"trigger_id": -1}), (400, {"trigger_id": 10**400}), (400, {"trigger_id": True}),
        (400, {"trigger_id": [6]}), (400, {"data": [10**400] + [None] * 7}), (400, {"data": ["\ud800"] + [None] * 7}),
        (400, {"data": [None, None, -(10**400), None, None, None, None, None]}),
    ],
)  # fmt: skip
def test_calls_that_are_none_are_refused(client, status, change):
    call = {"fn_index": 0, "session_hash": "calls", "data": [None] * 8, **change}
    answer = client.post(JOIN, content=json.dumps(call), headers={"content-type": "application/json"})
    assert answer.status_code == status and sentence(answer)


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[]", b"null", b"\xff", b'{"data": NaN}', b'{"data": 1e999}', b"9" * 5000,
             b"[" * 30_000, b'{"a":' * 10_000, b'{"x": ' + b"[" * 20 + b"]" * 20 + b"}", b'{"x": "\\udc00"}'],
)  # fmt: skip
@pytest.mark.parametrize("path", [JOIN, "/v1/images/generations"])
def test_bodies_that_are_no_request_are_refused(client, path, body):
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and sentence(answer)


@pytest.mark.parametrize(
    "values",
    [
        ["x", 10**9, 0, False, True, "", 7.5, None], ["x", "one", 0, False, True, "", 7.5, None],
        ["x", 1, "seed", False, True, "", 7.5, None], ["x", 1, 2**52, False, True, "", 7.5, None],
        ["x", 1, 0.5, False, True, "", 7.5, None], [3, 1, 0, "no", 7, [], "warm", None],
        [None] * 8, [[]] * 8, [{}] * 8, ["x" * 60_000, 1, 0, False, True, "", 7.5, None],
    ],
)  # fmt: skip
def test_odd_values_of_the_form_are_an_ordinary_error(client, values):
    session = f"odd{time.perf_counter_ns()}"
    answer = client.post(JOIN, json={"fn_index": 0, "session_hash": session, "data": values})
    assert answer.status_code in (200, 400, 413)
    if answer.status_code == 200:
        assert "process_completed" in stream(client, session)


def test_numbers_and_halves_of_characters_in_an_image_request_are_refused(client):
    for fields in (
        {"guidance_scale": 10**400}, {"seed": 10**400}, {"steps": -(10**400)}, {"n": 10**400},
        {"prompt": "\ud800"}, {"\ud800": 1}, {"model": "\udfff"}, {"negative_prompt": "a\ud800b"},
    ):  # fmt: skip
        body = json.dumps({"prompt": "x", **fields})
        answer = client.post(
            "/v1/images/generations", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and sentence(answer)


def form(name, content=b"abc", file="a.png"):
    file = "" if file is None else f'; filename="{file}"'
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n"


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""])
@pytest.mark.parametrize(
    "body", [b"", b"--x", b"--x\r\n\r\n", b"--x--", form("files"), form("files", file=None) + b"--x--",
             form("other") + b"--x--", form("files") * 3 + b"--x--", form("a", file=None) * 50 + b"--x--",
             form("files", b"a" * 2000, None) + b"--x--", b"--x\r\nA: \xff\r\n\r\n" + b"--x--"],
)  # fmt: skip
def test_uploads_that_are_none_are_refused(client, kind, body):
    answer = client.post("/gradio_api/upload", content=body, headers={"content-type": kind})
    assert answer.status_code == 400 and sentence(answer)


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.png",
        "..\\evil.png",
        "/etc/passwd",
        "a\x00b.png",
        "...",
        "",
        "x" * 500,
        "\u202e.png",
        "a b<c>.png",
    ],
)
def test_the_name_of_an_upload_is_no_path(client, live, name):
    # Without a name it is a field of the form, and no file.
    answer = client.post("/gradio_api/upload", files={"files": (name, b"\x89PNG")})
    assert answer.status_code == (200 if name else 400)
    if name:
        path = pathlib.PurePath(answer.json()[0])
        assert live[2] in path.parents and re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", path.name)


def test_unfinished_uploads_leave_nothing(client, live):
    before = sum(1 for _ in live[2].rglob("*"))
    head = b"POST /gradio_api/upload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4000000\r\n"
    head += b"content-type: multipart/form-data; boundary=x\r\n\r\n" + form("files", b"a" * 2_000_000)
    for _ in range(3):
        with connect(live[0]) as link:
            link.sendall(head)
    time.sleep(1)
    assert sum(1 for _ in live[2].rglob("*")) == before


def test_uploads_have_a_bounded_space(tmp_path, monkeypatch):
    from app import uploads

    monkeypatch.setattr(uploads, "MAX_BYTES", 25)
    store = uploads.Uploads(tmp_path)

    def send(content):
        body = form("files", content) + b"--x--\r\n"

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(b"content-type", b"multipart/form-data; boundary=x")]
        return asyncio.run(store.store({"type": "http", "headers": headers}, receive, "ann"))

    paths = [send(b"0123456789") for _ in range(4)]
    assert [pathlib.Path(path).exists() for path in paths] == [False, False, True, True]
    assert [store.belongs(path, "ann") for path in paths] == [False, False, True, True]
    assert not store.belongs(paths[3], "bob") and not store.belongs(paths[3], None)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_stream_of_an_unknown_tab_ends(client):
    assert "session_not_found" in client.get("/gradio_api/queue/data?session_hash=nobody").text


# Raw connections --------------------------------------------------------------------------------------------


def connect(url, source="127.0.0.1"):
    return socket.create_connection((url.host, url.port), 30, (source, 0))


def answered(link, seconds=30.0):
    """All that comes before the server closes the connection."""
    link.settimeout(seconds)
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while part := link.recv(65536):
            got += part
    return got


def raw(url, *lines, body=b""):
    with connect(url) as link:
        link.sendall("\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1") + body)
        return answered(link)


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


# A password -------------------------------------------------------------------------------------------------


@pytest.fixture()
def locked():
    from app import http, ui

    http.offline()
    engine = engine_of()
    app = create_app(engine, ui.build(engine), account="ann:p\u00e4ss:word")
    with TestClient(app, base_url="http://localhost") as client:
        yield client
    engine.close()


def test_a_password_covers_every_route_but_health(locked):
    for method, path in [("GET", "/"), ("GET", "/config"), ("POST", JOIN), ("GET", "/v1/models"), ("GET", "/x"),
                         ("POST", "/v1/images/generations"), ("GET", "/assets/a.js"), ("POST", "/gradio_api/upload"),
                         ("GET", "/healthz/"), ("GET", "/HEALTHZ"), ("GET", "//healthz")]:  # fmt: skip
        answer = locked.request(method, path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic"), path
    assert locked.get("/healthz").status_code == 200
    good = "Basic YW5uOnDDpHNzOndvcmQ="
    assert locked.get("/", headers={"authorization": good}).status_code == 200
    assert locked.get("/v1/models", headers={"authorization": good}).status_code == 200


def test_guessing_a_password_is_slow(locked, monkeypatch):
    for i in range(guard.MAX_WRONG):
        assert locked.get("/config", auth=("ann", f"guess{i}")).status_code == 401
    right = {"authorization": "Basic YW5uOnDDpHNzOndvcmQ="}
    answer = locked.get("/config", headers=right)
    assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= guard.LOCK_SECONDS
    now = time.monotonic()
    monkeypatch.setattr(guard.time, "monotonic", lambda: now + guard.LOCK_SECONDS + 1)
    assert locked.get("/config", headers=right).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic ???", "Bearer YW5u", "Basic YW5uOg==", "Basic \u00e4"]
)
def test_headers_that_are_no_password_are_refused(locked, header):
    assert locked.get("/config", headers={"authorization": header.encode("latin-1")}).status_code == 401


def test_other_machines_are_served_with_a_password_or_on_purpose(tmp_path):
    from app.__main__ import main
    from stepdistill.errors import UserError

    (tmp_path / "empty").write_text("")
    for arguments, word in [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--host", "::"], "--auth-file"),
        (["--auth", "ann"], "USER:PASSWORD"),
        (["--auth", ":x"], "USER:PASSWORD"),
        (["--auth-file", str(tmp_path / "empty")], "first line"),
        (["--auth-file", str(tmp_path / "none")], "cannot be read"),
        # The password is checked before what is wrong here.
        (["--host", "0.0.0.0", "--port", "0", "--no-auth", "--attention", "warp"], "--attention"),
        (["--host", "0.0.0.0", "--port", "0", "--auth", "a:b", "--attention", "warp"], "--attention"),
    ]:
        with pytest.raises(UserError, match=word):
            main(arguments)
    with pytest.raises(SystemExit):
        main(["--auth", "a:b", "--no-auth"])
