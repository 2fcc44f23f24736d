"""The web server: guards before anything else, the OpenAI-shaped route, and the page."""

from __future__ import annotations

import base64
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from app_fakes import FakeSampler
from starlette.testclient import TestClient

from app import png, settings
from app.engine import Engine
from app.guard import MAX_JSON
from app.http import create_app
from app.request import Request

ROOT = Path(__file__).resolve().parents[2]
ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(create_app(engine, gradio=False), base_url="http://localhost") as client:
        yield client


def ask(client, **fields):
    return client.post(ROUTE, json={"prompt": "a red circle", **fields})


# Guards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "169.254.1.1", "", "[::2]:80"])
def test_foreign_host_names_are_refused(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "LOCALHOST:1", "[::1]:7860", "::1"])
def test_our_names_are_served(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 200


def test_listening_everywhere_accepts_addresses_and_no_foreign_names(engine):
    with TestClient(
        create_app(engine, any_address=True, gradio=False), base_url="http://192.168.1.7:7860"
    ) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_posts_from_other_sites_are_refused(client, headers):
    assert client.post(ROUTE, json={"prompt": "x"}, headers=headers).status_code == 403


def test_posts_from_our_own_page_are_served(client):
    headers = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    assert client.post(ROUTE, json={"prompt": "x"}, headers=headers).status_code == 200


def test_bodies_are_capped_whether_or_not_they_say_their_length(client):
    long = json.dumps({"prompt": "x" * MAX_JSON}).encode()
    headers = {"content-type": "application/json"}
    assert client.post(ROUTE, content=long, headers=headers).status_code == 413
    assert client.post(ROUTE, content=iter([long]), headers=headers).status_code == 413


def test_every_answer_carries_the_security_headers(client):
    for answer in (
        client.get("/healthz"),
        client.get("/nothing"),
        client.get("/healthz", headers={"host": "evil"}),
    ):
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_description_of_the_api_is_there_only_when_asked(engine):
    app = create_app(engine, gradio=False, openapi=True)
    with TestClient(app, base_url="http://localhost") as client:
        described = client.get("/openapi.json").json()
    body = described["paths"][ROUTE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "seed" in body["properties"]


def test_docs_are_off(client):
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


def test_a_full_queue_refuses_before_a_body_is_read(client, engine, monkeypatch):
    monkeypatch.setattr(engine.batcher, "wait", lambda: 40.0)
    before = engine.metrics.counts().get("busy", 0)
    for path in (ROUTE, "/v1/images/edits"):
        answer = client.post(path, content=b"neither JSON nor a form")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        assert answer.json()["error"]["type"] == "busy" and "images are waiting" in answer.text
    assert engine.metrics.counts()["busy"] == before + 2
    # Of the page a newer request may take the place of an older one, so it is read.
    assert client.post("/api/generate", json={}).status_code == 400


# Health and models ------------------------------------------------------------------------------------------


def test_health_is_503_until_the_models_answer():
    hold = threading.Event()
    loader = lambda path, **_: hold.wait(5) and FakeSampler("student")  # noqa: E731
    engine = Engine("S", False, loader=loader, device="cpu").start()
    with TestClient(create_app(engine, gradio=False), base_url="http://localhost") as client:
        assert (client.get("/healthz").status_code, client.get("/healthz").json()["status"]) == (
            503,
            "loading",
        )
        assert client.get("/v1/models").json()["data"][0]["state"] == "loading"
        assert "stepdistill_ready 0" in client.get("/metrics").text
        threading.Timer(0.1, hold.set).start()
        # What is asked before the models are there is drawn when they are.
        assert ask(client).status_code == 200
        answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json()["attention"] == "sdpa (1/1 layers)"
    engine.close()


def test_models_are_listed(client):
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert rows["student"]["steps"] == [1, 2, 4] and rows["student"]["size"] == "64x64"
    assert rows["teacher"]["default_steps"] == 50
    assert client.get("/v1/models/teacher").json() == rows["teacher"]
    answer = client.get("/v1/models/techer")
    assert answer.status_code == 404 and "Did you mean 'teacher'" in answer.json()["error"]["message"]


def test_prometheus_can_read_the_metrics(client):
    before = client.get("/metrics").text
    ask(client, seed=1)
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values["stepdistill_ready"] == "1"
    count = int(values['stepdistill_images_total{model="student"}'])
    assert f'stepdistill_images_total{{model="student"}} {count}' not in before
    assert values['stepdistill_latency_seconds_bucket{model="student",le="+Inf"}'] == str(count)


# Images -----------------------------------------------------------------------------------------------------


def test_an_image_comes_back_with_its_seed_and_settings(client, engine):
    answer = ask(client, seed=7, steps=2, size="64x64", response_format="b64_json", model="student")
    assert answer.status_code == 200
    data = answer.json()["data"][0]
    pixels, text = png.read_png(base64.b64decode(data["b64_json"]))
    assert (data["seed"], data["steps"]) == (7, 2)
    same = engine.generate(Request("a red circle", seed=7, steps=2)).image
    assert np.array_equal(pixels, same)
    assert settings.from_settings(text, engine.limits).seed == 7


def test_several_images_have_their_own_seeds(client):
    data = ask(client, seed=2**32 - 1, n=3).json()["data"]
    assert [image["seed"] for image in data] == [2**32 - 1, 0, 1]
    assert len({image["b64_json"] for image in data}) == 3
    assert len({image["seed"] for image in ask(client, n=8).json()["data"]}) == 8


def test_the_teacher_takes_a_negative_prompt(client):
    answer = ask(client, model="teacher", seed=1, steps=3, negative_prompt="blur", guidance_scale=2.5)
    assert answer.status_code == 200 and answer.json()["model"] == "teacher"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("negative_prompt", {"negative_prompt": "blur"}),
        ("guidance_scale", {"guidance_scale": 7.5}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "x" * 2001}),
        ("prompt", {"prompt": None}),
        ("n", {"n": 0}),
        ("n", {"n": 9}),
        ("n", {"n": 1.5}),
        ("n", {"n": True}),
        ("size", {"size": "1024x1024"}),
        ("size", {"size": 64}),
        ("model", {"model": "dall-e-3"}),
        ("model", {"model": "both"}),
        ("response_format", {"response_format": "url"}),
        ("steps", {"steps": 3}),
        ("steps", {"steps": 4000}),
        ("seed", {"seed": 2**40}),
        ("seed", {"seed": "7"}),
        ("seed", {"seed": 1.0, "n": 2}),
        ("quality", {"quality": "hd"}),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, field, fields):
    answer = ask(client, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field and field in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", ["", "[", "[]", "3", '{"prompt": "x", "seed": NaN}', "[" * 60_000, "{}"])
def test_what_is_not_a_request_is_refused(client, raw):
    answer = client.post(ROUTE, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_only_json_is_read(client):
    assert (
        client.post(ROUTE, content='{"prompt": "x"}', headers={"content-type": "text/plain"}).status_code
        == 400
    )


def test_a_defect_tells_no_paths(client):
    answer = ask(client, prompt="poison")
    assert answer.status_code == 500
    assert "/path" not in answer.text and "Traceback" not in answer.text
    assert ask(client).status_code == 200


# The page ---------------------------------------------------------------------------------------------------


def test_the_page_is_served_and_runs_no_script_but_its_own(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "stepdistill" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    # Nothing inline, and nothing from elsewhere.
    assert "http" not in answer.text and "<style" not in answer.text and " on" + "click" not in answer.text
    named = set(re.findall(r'(?:src|href)="(/[^"]*)"', answer.text))
    for path in named:
        assert client.get(path).status_code == 200, path
    for file in (ROOT / "app" / "static").iterdir():
        assert client.get(f"/static/{file.name}").status_code == 200
    for path in ("..%2fhttp.py", "%2e%2e/http.py", "x.js", "", "index.html%00"):
        assert client.get(f"/static/{path}").status_code == 404


def draw(client, **fields):
    body = {"request": {"prompt": "a red circle", "seed": 5}, "session": "tab", "number": 1, **fields}
    return client.post("/api/generate", json=body)


def lines(answer):
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_page_gets_its_images_line_by_line(client, engine):
    shots = lines(draw(client, n=4, number=2))
    assert [shot["settings"]["seed"] for shot in shots] == [5, 6, 7, 8]
    pixels, text = png.read_png(base64.b64decode(shots[1]["png"]))
    assert np.array_equal(pixels, engine.generate(Request("a red circle", seed=6)).image)
    assert json.loads(text)["seed"] == 6
    (bare,) = lines(draw(client, embed=False, number=3))
    assert png.read_png(base64.b64decode(bare["png"]))[1] is None


def test_a_teacher_tells_its_steps(client, engine):
    teacher = engine.models.loaded["teacher"].sampler
    teacher.delay = 0.02
    told = lines(draw(client, request={"prompt": "a", "seed": 1, "model": "teacher"}, number=4))
    teacher.delay = 0.0
    steps = [line["step"] for line in told if "step" in line]
    assert steps == sorted(steps) and told[-1]["settings"]["steps"] == 50 and len(steps) > 1


def test_stop_counts_also_for_what_is_still_on_its_way(client):
    assert client.post("/api/stop", json={"session": "late", "number": 9}).json() == {"ended": 0}
    answer = draw(client, session="late", number=9)
    assert answer.status_code == 409 and answer.json()["error"]["type"] == "cancelled"
    assert draw(client, session="late", number=10).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0}, {"n": 9}, {"n": True}, {"session": "a/b"}, {"session": ""}, {"number": -1}, {"number": 2**60}, {"live": 1},
        {"more": 1}, {"request": []}, {"request": {"prompt": "x", "path": "/etc/passwd"}},
        {"request": {"prompt": "x", "seed": "1"}}, {"request": {"prompt": "x", "model": "../x"}},
        {"request": {"prompt": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}},
    ],
)  # fmt: skip
def test_what_the_page_would_never_ask_is_refused(client, fields):
    answer = draw(client, **{"session": "odd", "number": 100, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["message"].endswith(".")


def test_a_png_is_read_back_and_drawn_again(client, engine):
    made = engine.generate(Request("a red circle", seed=11, steps=2))
    said = client.post("/api/read", content=made.png()).json()
    assert (said["settings"]["seed"], said["settings"]["steps"]) == (11, 2)
    again = client.post("/api/reproduce", content=made.png()).json()
    assert again["identical"] and np.array_equal(png.read_png(base64.b64decode(again["png"]))[0], made.image)
    touched = made.image.copy()
    touched[0, 0] = 255 - touched[0, 0] // 2
    other = client.post("/api/reproduce", content=png.write_png(touched, made.settings())).json()
    assert not other["identical"] and "of 255 levels" in other["said"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a PNG"), (b"<svg onload=alert(1)>", "not a PNG"), (b"/etc/passwd", "not a PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * png.MAX_FILE, "bytes"),
    ],
)  # fmt: skip
def test_files_that_are_no_image_of_ours_are_refused(client, data, why):
    for path in ("/api/read", "/api/reproduce"):
        answer = client.post(path, content=data)
        assert answer.status_code in (400, 413) and why in answer.json()["error"]["message"]


def test_a_foreign_image_says_what_could_not_be_read(client):
    said = client.post("/api/read", content=png.write_png(np.zeros((8, 8, 3), np.uint8))).json()
    assert said["settings"] is None and "no settings" in said["notes"][0]


def test_nothing_is_known_of_tokens_where_there_is_no_tokenizer(client):
    assert client.post("/api/tokens", json={"model": "student", "prompt": "a"}).json() == {}
    assert client.post("/api/tokens", json={"model": "x", "prompt": "a"}).status_code == 400


def test_the_examples_are_scenes():
    from stepdistill.scenes import parse_caption

    text = (ROOT / "app" / "static" / "form.js").read_text()
    examples = re.search(r"EXAMPLES = \[(.*?)\];", text, re.DOTALL)[1]
    examples = re.findall(r'"([^"]+)"', examples)
    assert len(examples) == 4 and [parse_caption(text).caption for text in examples] == examples
