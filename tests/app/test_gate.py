"""Calls and routes: what the page needs works through the gate, and everything else is closed."""

from __future__ import annotations

import json
import time

import pytest
from app_clients import JOIN, sentence, stream


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


def test_a_call_comes_from_a_part_that_calls_the_function(client):
    """Every event of the page is let through as a browser sends it, its loading among them, and no other."""
    config = client.get("/config").json()
    functions = {function["id"]: function for function in config["dependencies"]}
    parts = {part["id"] for part in config["components"]}
    events = set()
    for index, function in functions.items():
        first = function
        while first["trigger_after"] is not None:
            first = functions[first["trigger_after"]]
        call = {"fn_index": index, "session_hash": f"from{index}", "data": [None] * len(function["inputs"])}
        call["event_data"] = {"index": 0, "value": None}
        # Leaving the page is an event of no part, and the server's own.
        own = {part for part, _ in first["targets"]} - {None}
        events |= {event for part, event in first["targets"] if part is not None}
        assert own or {"unload"} == {event for _, event in first["targets"]}
        for trigger in own:
            answer = client.post(JOIN, json={**call, "trigger_id": trigger})
            assert answer.status_code == 200, (index, trigger, answer.text)
        # A quarter of the others, and the next quarter at the next function.
        for trigger in [*sorted(parts - own)[index % 4 :: 4], max(parts) + 1]:
            answer = client.post(JOIN, json={**call, "trigger_id": trigger})
            assert answer.status_code == 400 and "trigger_id" in sentence(answer)
    assert events == {"click", "submit", "input", "upload", "select", "load", "tick"}


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


def test_the_stream_of_an_unknown_tab_ends(client):
    assert "session_not_found" in client.get("/gradio_api/queue/data?session_hash=nobody").text
