"""A server of the embedded pair under attack: every row of a list of abuses, random hostile requests, and many sessions.

    python benchmarks/hostile.py [--requests 1000] [--sessions 300]        -> benchmarks/hostile.json

Each case has the answers that are right for it; a traceback in the log, another answer or a server that has ended
fails. Memory is the server's resident size before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from stepdistill.errors import atomic_write

OUT = Path(__file__).with_name("hostile.json")
JOIN = "/gradio_api/queue/join"
IMAGES = "/v1/images/generations"
FILE = {
    "path": "/etc/passwd",
    "url": "file:///etc/passwd",
    "orig_name": "a.png",
    "meta": {"_type": "gradio.FileData"},
}
NESTED = "[" * 30_000
PNG = b"\x89PNG\r\n\x1a\n"
# Values that no field takes.
ODD = [
    None, True, False, -1, 0, 2.7, 10**400, -(10**400), 1e300, "abc", "", "\x00", "\u202e\u200b",
    "x" * 3000, [], [1], {}, FILE, [FILE], {"a": {"b": [FILE]}}, "../../etc/passwd", "/proc/self/environ",
    "http://169.254.169.254/", "<script>alert(1)</script>", "\ud800",
]  # fmt: skip
NO_STEPS = (4000, 0, -1, 2.7, "abc", True, [1], {})
NO_PICTURES = (
    "/etc/passwd",
    "/dev/zero",
    "http://127.0.0.1/a.png",
    "data:image/png;base64,AAAA",
    "../a",
    "0" * 64,
    7,
    {},
)
OWN, FORM = "x-session: mine", "content-type: multipart/form-data; boundary=x"
NO_MODELS = ("../x", "/etc", "http://a/b", "org/model", FILE)
FORGED = b'{"version": 1, "prompt": "<b>", "seed": 1, "steps": "9999", "model": "../../x"}'
HEADERS = [
    "host: evil", "host: localhost:99999999", "origin: null", "sec-fetch-site: cross-site", "content-length: -1",
    "x-forwarded-host: e", "transfer-encoding: gzip", "content-type: text/html", "authorization: Basic ====",
    "range: bytes=-0", "content-length: 99999999999",
]  # fmt: skip
CLIMBS = [
    "/static/../http.py", "/static/%2e%2e/http.py", "/static/..%2f..%2fREADME.md",
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=../../etc/passwd", "/gradio_api/file=file:///etc/passwd",
    "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/file=//etc/passwd",
    "/gradio_api/file=/etc/passwd%00.png", "/gradio/assets/..%2f..%2froutes.py", "/gradio/static/.hidden",
    "/gradio/gradio_api/file=/dev/zero", "/gradio_api/proxy=http://127.0.0.1/",
    "/api/runs/0/preview/../../x", "/api/runs/-1/preview/0", "/api/runs/99999999999/preview/1",
    "/v1/models/..%2f..%2fx", "/gradio_api/upload", "/gradio_api/run/predict",
    "/gradio/gradio_api/call/generate", "/gradio_api/component_server", "/gradio_api/stream/1",
    "/monitoring",
]  # fmt: skip


class Server:
    """`python -m app` in a process of its own, with its log in a file."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-m", "app", "--port", "0", "--threads", "1", *flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.port = int(re.search(r":(\d+)", self.process.stdout.readline())[1])
        assert self.process.stdout.readline().startswith("ready"), self.log.read_text()

    def memory(self) -> float:
        """Resident MB."""
        return (
            int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024
        )

    def ask(self, *sent: Any) -> tuple[int, bytes]:
        return ask(self.port, *sent)

    def close(self) -> str:
        """End it, and return its log."""
        assert self.process.poll() is None, "the server has ended"
        self.process.terminate()
        self.process.wait(30)
        return self.log.read_text()


def ask(
    port: int, method: str, path: str, body: bytes = b"", headers: tuple[str, ...] = (), length: bool = True
) -> tuple[int, bytes]:
    """Status (0 where the connection was closed without one) and body."""
    given = {line.split(":")[0].lower() for line in headers}
    own = [] if "host" in given else ["host: localhost"]
    own += ["content-type: application/json"] if body and "content-type" not in given else []
    own += [f"content-length: {len(body)}"] if length and (body or method == "POST") else []
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *own, *headers, "connection: close", "", ""])
    got = b""
    with socket.create_connection(("127.0.0.1", port), 60) as link:
        with contextlib.suppress(ConnectionError):
            link.sendall(head.encode("utf-8", "replace") + body)
        with contextlib.suppress(ConnectionError):
            while part := link.recv(65536):
                got += part
    status = re.match(rb"HTTP/1.1 (\d+)", got)
    return int(status[1]) if status else 0, got.partition(b"\r\n\r\n")[2]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def image(**fields: Any) -> bytes:
    return dumped({"prompt": "a red circle", "seed": 1, **fields})


def drawing(**fields: Any) -> bytes:
    request = {"prompt": "a red circle", "seed": 1}
    return dumped({"request": request, "session": "abuse", "number": 1, "n": 1, **fields})


def call(at: int, value: Any, index: int = 0) -> bytes:
    data = ["a red circle", "student", 1, 1, 1, "", None]
    data[at] = value
    return dumped({"fn_index": index, "session_hash": "abuse", "data": data})


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def picture(text: bytes = b"", side: int = 8) -> bytes:
    """A black PNG of 8 pixels a side, whatever its header says, with settings inside."""
    header = chunk(b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00")
    said = chunk(b"tEXt", b"stepdistill\0" + text) if text else b""
    return PNG + header + said + chunk(b"IDAT", zlib.compress(bytes(8 * 25))) + chunk(b"IEND", b"")


def from_picture(name: object) -> bytes:
    return drawing(request={"prompt": "x", "image": name})


def abuses() -> list[tuple[str, set[int], tuple]]:
    """Name, the answers that are right, and what is sent, of every row that one request can show."""
    post = lambda path, body, *headers: ("POST", path, body, headers)  # noqa: E731
    get = lambda path, *headers: ("GET", path, b"", headers)  # noqa: E731
    rows = [
        ("prompt of 10 MB", {413}, post(IMAGES, image(prompt="x" * 10_000_000))),
        ("prompt of 2,001 characters", {400}, post(IMAGES, image(prompt="x" * 2001))),
        ("empty prompt", {400}, post(IMAGES, image(prompt=" \t"))),
        ("prompt of marks that cannot be seen", {400}, post(IMAGES, image(prompt="\u200b\u202e\x00"))),
        ("half a character", {400}, post(IMAGES, image(prompt="\ud800"))),
        ("200 combining marks", {200}, post(IMAGES, image(prompt="a" + "\u0301" * 200))),
        *((f"steps of {value!r:.20}", {400}, post(IMAGES, image(steps=value))) for value in NO_STEPS),
        ("NaN", {400}, post(IMAGES, b'{"prompt": "x", "guidance_scale": NaN}')),
        ("infinity", {400}, post(IMAGES, b'{"prompt": "x", "guidance_scale": 1e999}')),
        *((f"seed {value!r:.20}", {400}, post(IMAGES, image(seed=value))) for value in (-2, 2**63, 1e30, "7", 10**400)),
        *((f"size {value!r}", {400}, post(IMAGES, image(size=value))) for value in ("16384x16384", "1x1", "513x511", 64)),
        ("n 1000", {400}, post(IMAGES, image(n=1000))),
        ("too few values of a call", {400}, post(JOIN, dumped({"fn_index": 0, "session_hash": "a", "data": []}))),
        ("too many values of a call", {400}, post(JOIN, dumped({"fn_index": 0, "session_hash": "a", "data": [None] * 20}))),
        *((f"function {value!r:.8}", {404}, post(JOIN, call(0, "x", value))) for value in (-1, 9999, 10**400, True, "0")),
        ("past the queue", {404}, post("/gradio_api/run/predict", call(0, "x"))),
        *((f"file in input {at}", {400}, post(JOIN, call(at, FILE))) for at in range(7)),
        *((f"address {path}", {400, 404}, get(path)) for path in CLIMBS),
        ("decompression bomb", {400}, post("/api/read", picture(side=50_000), "content-type: image/png")),
        ("settings of 20 kB in a PNG", {400}, post("/api/read", picture(b"x" * 20_000), "content-type: image/png")),
        ("settings nested 2,500 deep", {400}, post("/api/read", picture(b'{"a":' * 2500), "content-type: image/png")),
        ("settings of another version", {400}, post("/api/read", picture(b'{"version": 9}'), "content-type: image/png")),
        ("forged settings", {400}, post("/api/read", picture(FORGED), "content-type: image/png")),
        ("a PNG of others", {200}, post("/api/read", picture(), "content-type: image/png")),
        ("truncated PNG", {400}, post("/api/read", picture()[:45], "content-type: image/png")),
        ("SVG", {400}, post("/api/reproduce", b"<svg onload=alert(1)>", "content-type: image/svg+xml")),
        ("upload over 8 MB", {413}, post("/api/read", PNG + b"0" * 9_000_000, "content-type: image/png")),
        ("a picture that is none", {400}, post("/api/picture", b"/etc/passwd", OWN)),
        ("a picture that is a bomb", {400}, post("/api/picture", picture(side=50_000), OWN)),
        ("a picture of nobody", {400}, post("/api/picture", picture())),
        ("a form without a picture", {400}, post("/v1/images/edits", b"--x--\r\n", FORM)),
        ("a form that is none", {400}, post("/v1/images/edits", b"/dev/zero", FORM)),
        *((f"picture {value!r:.30}", {400}, post("/api/generate", from_picture(value))) for value in NO_PICTURES),
        *((f"model {value!r:.30}", {400}, post(IMAGES, image(model=value))) for value in NO_MODELS),
        ("load of a path", {404, 400}, post("/api/load", dumped({"model": "/etc/passwd"}))),
        ("another site's form", {403}, post(IMAGES, image(), "origin: http://evil.example")),
        ("DNS rebinding", {400}, get("/healthz", "host: evil.example")),
        ("a host behind a bracket", {400}, get("/healthz", "host: [127.0.0.1]evil")),
        ("forwarded host", {400}, get("/healthz", "x-forwarded-host: evil.example")),
        ("two lengths", {400}, post(IMAGES, image(), "transfer-encoding: chunked")),
        ("JSON nested 30,000 deep", {400}, post(IMAGES, NESTED.encode())),
        ("no JSON", {400}, post(IMAGES, b"\xff\xfe")),
        ("form", {400}, post(IMAGES, b"prompt=x", "content-type: application/x-www-form-urlencoded")),
        ("unknown field", {400}, post(IMAGES, image(lora="/x"))),
        ("a negative prompt of a student", {400}, post(IMAGES, image(negative_prompt="x"))),
        ("Stop of a session that is none", {400}, post("/api/stop", dumped({"session": "../x", "number": 1}))),
        ("Stop of another's session", {200}, post("/api/stop", dumped({"session": "another", "number": 2**50}))),
        ("script in a prompt", {200}, post(IMAGES, image(prompt="<script>alert(1)</script>"))),
        ("upgrade to a WebSocket", {404}, get("/nothing", "upgrade: websocket", "sec-websocket-version: 13")),
        ("an odd Range", {200}, get("/static/base.css", "range: bytes=9999999-")),
        ("100 kB of address", {400, 404}, get("/" + "a" * 100_000)),
    ]  # fmt: skip
    return rows


def made_up(dice: random.Random) -> tuple[set[int], tuple]:
    """A random hostile request, and the answers that are right."""
    kind = dice.randrange(8)
    prefix = dice.choice(("", "/gradio"))
    value = dice.choice(ODD)
    if kind < 3:
        field = dice.choice(
            ("prompt", "steps", "seed", "n", "size", "model", "guidance_scale", "response_format", "more")
        )
        return {200, 400}, ("POST", IMAGES, image(**{field: value}), ())
    if kind == 3:
        field = dice.choice(("request", "session", "number", "n", "live", "embed", "more"))
        return {200, 400, 409}, ("POST", "/api/generate", drawing(**{field: value}), ())
    if kind == 4:
        return {200, 400, 404}, (
            "POST",
            prefix + JOIN,
            call(dice.randrange(7), value, dice.choice((0, 1, 2, 3, 4, 5, 99, -1))),
            (),
        )
    if kind == 5:
        path = dice.choice(
            ("/api/read", "/api/reproduce", "/api/load", "/api/tokens", "/api/stop", IMAGES, JOIN)
        )
        raw = bytes(dice.randrange(256) for _ in range(dice.randrange(400)))
        return {400, 404, 413}, (
            "POST",
            path,
            dice.choice((raw, PNG + raw, NESTED.encode(), b"{" + raw, dumped(value))),
            (),
        )
    if kind == 6:
        path = prefix + dice.choice(CLIMBS) + dice.choice(("", "?x=%00", "%ff", "/../x"))
        return {400, 404}, (
            dice.choice(("GET", "POST", "HEAD", "PUT", "TRACE", "DELETE", "OPTIONS")),
            path,
            b"",
            (),
        )
    header = dice.choice(HEADERS)
    return {200, 400, 403, 404, 408, 413, 501}, (
        "POST",
        dice.choice((IMAGES, JOIN, "/api/stop")),
        image(),
        (header,),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        measured = attacked(server, args.requests) | {"sessions": visited(server, args.sessions)}
        log = server.close()
    measured["traceback"] = "Traceback" in log
    print(json.dumps(measured, indent=1))
    with atomic_write(OUT) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n")


def attacked(server: Server, count: int) -> dict[str, Any]:
    """The list of abuses, and `count` random requests, warm, so that memory is that of serving."""
    dice = random.Random(0)
    server.ask("GET", "/gradio/")
    for _ in range(50):
        server.ask(*made_up(dice)[1])
    rows, wrong = {}, []
    for name, right, sent in abuses():
        status, body = server.ask(*sent)
        rows[name] = [status, sentence(body)]
        if status not in right:
            wrong.append([name, status])
    before, statuses = server.memory(), Counter()
    for at in range(count):
        right, sent = made_up(dice)
        status, body = server.ask(*sent)
        statuses[status] += 1
        if status not in right or b"Traceback" in body or b"root:" in body:
            wrong.append([at, status, repr(sent)[:300]])
    alive = server.ask("GET", "/healthz")[0] == 200
    return {
        "abuses": rows, "random": count, "statuses": dict(sorted(statuses.items())), "wrong": wrong, "alive": alive,
        "memory_mb": [round(before, 1), round(server.memory(), 1)],
    }  # fmt: skip


def sentence(body: bytes) -> str:
    """What a refusal says."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return ""


def visited(server: Server, count: int) -> dict[str, Any]:
    """Sessions of the page, and of Gradio's, which each load it, draw once and go."""
    grown = {}
    for name, visit in (("page", page), ("gradio", gradio_page)):
        for at in range(50):
            visit(server, f"warm-{at}")
        before = server.memory()
        for at in range(count):
            visit(server, f"visit-{at}")
        grown[name] = {"sessions": count, "memory_mb": [round(before, 1), round(server.memory(), 1)]}
    return grown


def page(server: Server, session: str) -> None:
    for path in ("/", "/static/main.js", "/api/models", "/api/metrics"):
        assert server.ask("GET", path)[0] == 200
    assert server.ask("POST", "/api/tokens", dumped({"model": "student", "prompt": session}))[0] == 200
    body = drawing(session=session, request={"prompt": f"a red circle {session}", "seed": 1})
    assert server.ask("POST", "/api/generate", body)[0] == 200


def gradio_page(server: Server, session: str) -> None:
    assert server.ask("GET", "/gradio/")[0] == 200
    body = json.loads(call(0, f"a red circle {session}")) | {"session_hash": session}
    assert server.ask("POST", "/gradio" + JOIN, dumped(body))[0] == 200
    assert b'"success":true' in server.ask("GET", f"/gradio/gradio_api/queue/data?session_hash={session}")[1]


if __name__ == "__main__":
    main()
