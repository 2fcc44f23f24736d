"""Fake models: an engine, and for all hostile clients one server, as `python -m app` runs it."""

from __future__ import annotations

import httpx
import pytest
from app_fakes import FakeSampler, engine_of, served


@pytest.fixture(scope="module")
def engine():
    engine = engine_of()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
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


@pytest.fixture()
def pair():
    student, teacher = FakeSampler("student"), FakeSampler("teacher")
    engine = engine_of(student, teacher)
    yield engine, student, teacher
    student.gate.set()
    teacher.gate.set()
    engine.close()
    assert not engine._thread.is_alive()
