"""What a client of the whole server does in the tests: calls of the page, forms, and raw connections."""

from __future__ import annotations

import contextlib
import socket

JOIN = "/gradio_api/queue/join"


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
    """Index and kinds of inputs of every function that gradio_client may call."""
    config = client.get("/config").json()
    kinds = {part["id"]: part["type"] for part in config["components"]}
    return [(d["id"], [kinds[part] for part in d["inputs"]]) for d in config["dependencies"]]


def sentence(answer):
    message = answer.json()["error"]["message"]
    assert message.endswith(".") and "\n" not in message and len(message) < 200
    return message


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
