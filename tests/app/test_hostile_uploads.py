"""Uploads: whatever a form holds, one file is kept for its browser, under a harmless name."""

from __future__ import annotations

import asyncio
import pathlib
import re
import time

import pytest
from app_clients import connect, form, sentence


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
