"""The engine draws without gradio, and every page is served without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError("no module named " + name)
sys.meta_path.insert(0, Blocked())
"""
DRAWS = """
from app_fakes import engine_of
from app.request import Request
engine = engine_of(teacher=False)
print(engine.generate(Request("a red circle", seed=1)).image.shape)
engine.close()
try:
    import app.ui
except ModuleNotFoundError as error:
    print(error)
"""
SERVES = """
from starlette.testclient import TestClient
from app.engine import Engine
from app.http import create_app
engine = Engine()
with TestClient(create_app(engine), base_url="http://localhost") as client:
    for path in ("/", "/static/main.js", "/api/models", "/v1/models", "/gradio/", "/config"):
        print(path, client.get(path).status_code)
try:
    import app.models
except ModuleNotFoundError as error:
    print(error)
"""


def printed(name: str, code: str) -> list[str]:
    """What a process prints in which `name` cannot be imported."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BLOCKED.format(name=name) + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_engine_draws_without_gradio():
    assert printed("gradio", DRAWS) == ["(64, 64, 3)", "no module named gradio"]


def test_the_pages_are_served_without_torch():
    *pages, refused = printed("torch", SERVES)
    assert len(pages) == 6 and all(page.endswith(" 200") for page in pages), pages
    assert refused == "no module named torch"
