"""A password on the server, and who is served without one."""

from __future__ import annotations

import time

import pytest
from app_clients import JOIN
from app_fakes import engine_of
from starlette.testclient import TestClient

from app import guard
from app.http import create_app


@pytest.fixture()
def locked():
    engine = engine_of()
    app = create_app(engine, account="ann:p\u00e4ss:word")
    with TestClient(app, base_url="http://localhost") as client:
        yield client
    engine.close()


def test_a_password_covers_every_route_but_health(locked):
    for method, path in [("GET", "/"), ("GET", "/config"), ("POST", JOIN), ("GET", "/v1/models"), ("GET", "/x"),
                         ("POST", "/v1/images/generations"), ("GET", "/static/main.js"), ("POST", "/api/read"),
                         ("GET", "/healthz/"), ("GET", "/HEALTHZ"), ("GET", "//healthz")]:  # fmt: skip
        answer = locked.request(method, path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic"), path
    assert locked.get("/healthz").status_code == 200
    good = "Basic YW5uOnDDpHNzOndvcmQ="
    assert locked.get("/", headers={"authorization": good}).status_code == 200
    assert locked.get("/v1/models", headers={"authorization": good}).status_code == 200


def test_guessing_a_password_is_slow(locked, monkeypatch):
    for i in range(guard.MAX_WRONG):
        assert locked.get("/v1/models", auth=("ann", f"guess{i}")).status_code == 401
    right = {"authorization": "Basic YW5uOnDDpHNzOndvcmQ="}
    answer = locked.get("/v1/models", headers=right)
    assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= guard.LOCK_SECONDS
    now = time.monotonic()
    monkeypatch.setattr(guard.time, "monotonic", lambda: now + guard.LOCK_SECONDS + 1)
    assert locked.get("/v1/models", headers=right).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic ???", "Bearer YW5u", "Basic YW5uOg==", "Basic \u00e4"]
)
def test_headers_that_are_no_password_are_refused(locked, header):
    assert locked.get("/v1/models", headers={"authorization": header.encode("latin-1")}).status_code == 401


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
        (["--host", "0.0.0.0", "--port", "0", "--no-auth", "--attention", "warp"], "attention"),
        (["--host", "0.0.0.0", "--port", "0", "--auth", "a:b", "--attention", "warp"], "attention"),
    ]:
        with pytest.raises(UserError, match=word):
            main(arguments)
    with pytest.raises(SystemExit):
        main(["--auth", "a:b", "--no-auth"])
