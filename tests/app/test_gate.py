"""Calls and routes: what the page needs works through the gate, and everything else is closed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time

import numpy as np
import pytest
from app_clients import JOIN, sentence, stream

from app import gate, png

# Of "/generate": prompt, model, steps, seed, n, negative prompt, guidance.
VALUES = ["a red circle", "student", 1, 3, 1, "", None]

OF_THE_PAGE = ("/theme.css", "/gradio_api/startup-events")


def test_gradio_client_works_through_the_gate(client, live):
    from gradio_client import Client

    caller = Client(str(live[0]), verbose=False, download_files=False, httpx_kwargs={"timeout": 60})
    images, settings = caller.predict("a red circle", "student", 2, 3, 2, "", None, api_name="/generate")
    assert [(one["seed"], one["steps"]) for one in settings] == [(3, 2), (4, 2)]
    served = client.get(images[0]["image"]["url"])
    pixels, text = png.read_png(served.content)
    same = client.post(
        "/v1/images/generations", json={"prompt": "a red circle", "seed": 3, "steps": 2}
    ).json()
    assert np.array_equal(pixels, png.read_png(base64.b64decode(same["data"][0]["b64_json"]))[0])
    assert json.loads(text)["seed"] == 3
    caller.close()


def test_a_call_comes_from_a_part_that_calls_the_function(client):
    config = client.get("/config").json()
    parts = {part["id"] for part in config["components"]}
    function = next(d for d in config["dependencies"] if d["api_name"] == "generate")
    own = {part for part, _ in function["targets"]}
    call = {"fn_index": function["id"], "session_hash": "part", "data": VALUES}
    for trigger in own:
        assert client.post(JOIN, json={**call, "trigger_id": trigger}).status_code == 200
    for trigger in [*sorted(parts - own), max(parts) + 1]:
        answer = client.post(JOIN, json={**call, "trigger_id": trigger})
        assert answer.status_code == 400 and "trigger_id" in sentence(answer)


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
        ("PUT", "/gradio_api/upload"), ("OPTIONS", "/config"), ("POST", "/gradio_api/upload"), ("GET", "/theme.css"),
        ("GET", "/gradio_api/app_id"), ("GET", "/gradio_api/upload_progress?upload_id=a"),
        ("GET", "/gradio_api/heartbeat/a%2fb"), ("GET", "/static/..%2f..%2froutes.py"), ("GET", "/assets/%00"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(client, method, path):
    for before in ("", "/gradio") if path not in OF_THE_PAGE else ("",):
        answer = client.request(method, before + path, json={"data": []} if method == "POST" else None)
        assert answer.status_code == 404 and sentence(answer)


def test_gradios_page_is_served_with_its_files_and_a_policy(client):
    answer = client.get("/gradio", follow_redirects=True)
    assert answer.url.path == "/gradio/" and "gradio_config" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "frame-ancestors 'none'" in policy
    for path in (*re.findall(r'"\./(assets/[^"]+)"', answer.text), "theme.css"):
        assert client.get(f"/gradio/{path}").status_code == 200, path
    for path in ("assets/../routes.py", "assets/%2e%2e/index.html", "static/.hidden", "assets//etc/passwd"):
        assert client.get(f"/gradio/{path}").status_code == 404, path
    assert client.get("/gradio/config").json()["dependencies"][0]["api_name"] == "generate"
    assert client.post("/gradio" + JOIN, json={"fn_index": 0}).status_code == 400


def test_two_models_are_compared_from_the_same_noise(client, live):
    from gradio_client import Client

    caller = Client(f"{live[0]}/gradio", verbose=False, download_files=False, httpx_kwargs={"timeout": 60})
    left, right, both, said = caller.predict(
        "a red circle", 3, "teacher", 5, "student", 2, api_name="/compare"
    )
    assert len(both) == 2 and "seed 3" in said and "5 steps" in said and "2 steps" in said
    made = [json.loads(png.read_png(client.get(one["url"]).content)[1]) for one in (left, right)]
    assert [(one["model"], one["steps"], one["seed"]) for one in made] == [
        ("teacher", 5, 3),
        ("student", 2, 3),
    ]
    caller.close()


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (404, {"fn_index": -1}), (404, {"fn_index": 10_000}), (404, {"fn_index": None}), (404, {"fn_index": True}),
        (404, {"fn_index": "0"}), (404, {"fn_index": 10**400}), (404, {"fn_index": 0.0}), (404, {"fn_index": [0]}),
        (400, {"data": []}), (400, {"data": [None] * 8}), (400, {"data": {}}), (400, {"data": None}),
        (400, {"session_hash": None}), (400, {"session_hash": ""}), (400, {"session_hash": "a/../b"}),
        (400, {"session_hash": "x" * 65}), (400, {"session_hash": 3}), (400, {"session_hash": "\ud800"}),
        (400, {"trigger_id": -1}), (400, {"trigger_id": 10**400}), (400, {"trigger_id": True}),
        (400, {"trigger_id": [6]}), (400, {"data": [10**400] + [None] * 6}), (400, {"data": ["\ud800"] + [None] * 6}),
        (400, {"data": [None, None, -(10**400), None, None, None, None]}),
    ],
)  # fmt: skip
def test_calls_that_are_none_are_refused(client, status, change):
    call = {"fn_index": 0, "session_hash": "calls", "data": [None] * 7, **change}
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
        ["x", "student", 10**9, 0, 1, "", None], ["x", "student", "one", 0, 1, "", None], ["x", "student", 1, "seed", 1, "", None],
        ["x", "student", 1, 2**52, 1, "", None], [3, 1, "no", [], 7, [], "warm"],
        ["x", "../../etc", 1, 0, 1, "", None], ["x", "student", 1, 0, 10**6, "", None], ["x", "student", 1, 0, 0, "", None],
        ["x", "student", 1, 0, None, None, True], [None] * 7, [[]] * 7, [{}] * 7, ["x" * 60_000, "student", 1, 0, 1, "", None],
    ],
)  # fmt: skip
def test_odd_values_of_the_form_are_an_ordinary_error(client, values):
    session = f"odd{time.perf_counter_ns()}"
    answer = client.post(JOIN, json={"fn_index": 0, "session_hash": session, "data": values})
    assert answer.status_code in (200, 400, 413)
    if answer.status_code == 200:
        said = stream(client, session)
        assert "process_completed" in said and '"success":false' in said


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


@pytest.mark.parametrize(
    ("headers", "bodies", "passed"),
    [
        # Cut off: an end is sent, unless a length was declared that cannot be kept; and none after an end.
        ([], [{"more_body": True}], 3),
        ([(b"Content-Length", b"9")], [], 1),
        ([(b"content-length", b"0")], [{}], 2),
    ],
)
def test_a_stream_that_breaks_has_one_end_at_most(headers, bodies, passed):
    sent, gone = [], []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in bodies:
            await send({"type": "http.response.body", "body": b"", **body})
        raise RuntimeError("as Gradio does")

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    asyncio.run(gate._stream(app, {}, receive, send, lambda: gone.append(1)))
    assert len(sent) == passed and not gone
    assert passed == 1 or not sent[-1].get("more_body", False)


def test_the_stream_of_an_unknown_tab_ends(client):
    assert "session_not_found" in client.get("/gradio_api/queue/data?session_hash=nobody").text
