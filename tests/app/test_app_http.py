"""The web server: guards before anything else, the OpenAI-shaped route, and the page."""

from __future__ import annotations

import base64
import json
import socket
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
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def page(engine):
    """The whole server with the page in it; gradio is imported once, here."""
    from app import http, ui

    http.offline()
    with TestClient(create_app(engine, ui.build(engine)), base_url="http://localhost") as client:
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
    with TestClient(create_app(engine, any_address=True), base_url="http://192.168.1.7:7860") as client:
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
        assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_docs_are_off(client):
    assert {client.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


# Health and models ------------------------------------------------------------------------------------------


def test_health_is_503_until_the_models_answer():
    hold = threading.Event()
    loader = lambda path, **_: hold.wait(5) and FakeSampler("student")  # noqa: E731
    engine = Engine("S", False, loader=loader, device="cpu").start()
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        assert (client.get("/healthz").status_code, client.get("/healthz").json()["status"]) == (
            503,
            "loading",
        )
        assert ask(client).status_code == 503
        assert client.get("/v1/models").status_code == 503
        hold.set()
        engine.wait(30)
        answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json()["attention"] == "sdpa (1/1 layers)"
    engine.close()


def test_models_are_listed(client):
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert rows["student"]["steps"] == [1, 2, 4] and rows["student"]["size"] == "64x64"
    assert rows["teacher"]["default_steps"] == 50


# Images -----------------------------------------------------------------------------------------------------


def test_an_image_comes_back_with_its_seed_and_settings(client, engine):
    answer = ask(client, seed=7, steps=2, size="64x64", response_format="b64_json", model="student")
    assert answer.status_code == 200
    data = answer.json()["data"][0]
    pixels, text = png.read_png(base64.b64decode(data["b64_json"]))
    assert (data["seed"], data["steps"]) == (7, 2)
    same = engine.generate(Request("a red circle", seed=7, steps=2)).shots["student"].image
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


def test_the_page_is_served_and_asks_no_other_host(page):
    answer = page.get("/")
    assert answer.status_code == 200 and "stepdistill" in answer.text
    assert answer.headers["x-frame-options"] == "DENY"
    config = page.get("/config").json()
    assert not config.get("analytics_enabled", False)
    assert config["api_prefix"] == "/gradio_api"


def test_the_doors_gradio_leaves_open_are_closed(page):
    assert page.post("/gradio_api/run/make", json={"data": []}).status_code == 404
    assert page.get("/config", headers={"host": "evil.example"}).status_code == 400
    upload = {"files": ("a.png", b"x" * 100, "image/png")}
    assert (
        page.post("/gradio_api/upload", files=upload, headers={"origin": "http://evil.example"}).status_code
        == 403
    )
    assert page.post("/gradio_api/upload", files=upload).status_code == 200
    large = {"files": ("a.png", b"x" * (png.MAX_FILE + 1), "image/png")}
    assert page.post("/gradio_api/upload", files=large).status_code == 413
    for path in ("/etc/passwd", "%2e%2e/%2e%2e/etc/passwd", str(ROOT / "pyproject.toml")):
        assert page.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_the_examples_are_scenes():
    from app.layout import EXAMPLES
    from stepdistill.scenes import parse_caption

    assert [parse_caption(text).caption for text in EXAMPLES] == list(EXAMPLES)


# The command ------------------------------------------------------------------------------------------------


def test_a_busy_port_is_one_sentence(capsys):
    from app.__main__ import main
    from stepdistill.errors import cli_errors

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stopped, cli_errors():
            main(["--port", str(taken.getsockname()[1])])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1 and "--port" in said and "in use" in said


def test_mistakes_on_the_command_line_are_one_sentence():
    from app.__main__ import main
    from stepdistill.errors import UserError

    for arguments, word in [
        (["--port", "99999"], "--port"),
        (["--threads", "0"], "--threads"),
        (["--student", "/nowhere"], "--student"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--teacher", ".", "--no-teacher"], "--no-teacher"),
        (["--port", "0", "--attention", "warp"], "--attention"),
        (["--port", "0", "--device", "warp"], "device must be"),
    ]:
        with pytest.raises(UserError, match=word):
            main(arguments)


def test_the_help_keeps_its_lines():
    from app.__main__ import EXAMPLES, parser

    text = parser().format_help()
    assert EXAMPLES in text
    lines = EXAMPLES.splitlines()
    commands = [line for line in lines if line.startswith("  python -m app") or line.startswith("  curl")]
    # Each example begins a line, and what it does stands below it.
    assert len(commands) == EXAMPLES.count("python -m app") + EXAMPLES.count("curl") >= 6
    assert all(len(line) <= 100 for line in lines)
    parser().parse_args(["--student", "S", "--no-teacher"])
