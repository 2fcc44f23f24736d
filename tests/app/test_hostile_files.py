"""Hostile clients and files: no path, link or address that a client names is opened."""

from __future__ import annotations

import contextlib
import http.server
import os
import threading
import time

import httpx
import pytest
from app_clients import JOIN, handlers, sentence, stream
from app_fakes import CANARY


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
    """Each bait in every disguise at every input."""
    turn = 0
    for index, inputs in handlers(client):
        for at in range(len(inputs)):
            turn += 1
            for path in bait:
                for value in disguises(path):
                    data = [value if i == at else None for i in range(len(inputs))]
                    join = JOIN if turn % 2 else "/gradio" + JOIN
                    answer = client.post(join, json={"fn_index": index, "session_hash": "a", "data": data})
                    assert answer.status_code == 400, (index, at, value)
                    assert CANARY not in answer.text and sentence(answer)
    assert turn == 16 and nowhere(live)


@pytest.mark.parametrize("field", ["event_data", "trigger_id", "session_hash", "fn_index", "data", "more"])
def test_no_other_field_of_a_call_opens_a_path(client, live, bait, field):
    """Every value at some function, and every function with some values: each third of them, in turn."""
    values = [value for path in bait for value in (disguises(path)[2], path)]
    for turn, (index, inputs) in enumerate(handlers(client)):
        sessions = []
        for at, value in list(enumerate(values))[turn % 3 :: 3]:
            session = f"{field.replace('_', '')}-{index}-{at}"
            body = {"fn_index": index, "session_hash": session, "data": [None] * len(inputs)}
            answer = client.post(JOIN, json={**body, field: value})
            assert answer.status_code < 500 and CANARY not in answer.text
            if answer.status_code == 200:
                # Which are left out.
                assert field in ("event_data", "more")
                sessions.append(session)
            else:
                assert sentence(answer)
        for session in sessions:
            assert CANARY not in stream(client, session)
    assert nowhere(live)


def test_no_address_opens_a_path(client, live, bait):
    for path in [*bait, "/dev/zero", "//etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd%00.png"]:
        for before in ("file=", "file/", "proxy=", "stream/", "custom_component/"):
            for door in ("", "/gradio"):
                answer = client.get(f"{door}/gradio_api/{before}{path}")
                assert answer.status_code in (400, 404) and CANARY not in answer.text
        for before in ("static/", "assets/", "svelte/", "gradio_api/", "gradio/static/", "gradio/assets/"):
            assert client.get(f"/{before}{path}").status_code in (400, 404)
    for path in live[2].rglob("*"):  # the log and the directories beside the cache
        assert client.get(f"/gradio_api/file={path}").status_code in (404, 200)
    assert client.get(f"/gradio_api/file={live[1]}").status_code == 404


def test_what_lies_beside_or_behind_a_served_file_is_not_served(client, live):
    data = ["a red circle", "student", 1, 3, 1, "", None]
    assert client.post(JOIN, json={"fn_index": 0, "session_hash": "served", "data": data}).status_code == 200
    path = stream(client, "served").split('"path":"')[1].split('"')[0]
    assert client.get(f"/gradio_api/file={path}").content.startswith(b"\x89PNG")
    secret = live[2] / "beside.png"
    secret.write_text(CANARY)
    os.remove(path)
    os.symlink(secret, path)
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
