"""The page in a real browser: it loads, draws, and asks nobody else."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from app_browser import CHROMIUM, Tab

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
SHOWN = (
    "[...document.querySelectorAll('.shot img')].filter(image => image.naturalWidth).map(image => image.src)"
)
PROMPT = "document.querySelector('#prompt textarea')"


@pytest.fixture()
def tab(live, tmp_path):
    tab = Tab(tmp_path)
    tab.send("Page.navigate", url=str(live[0]))
    yield tab
    tab.close()


def test_the_page_draws_in_a_browser_and_asks_nobody_else(tab, live, client):
    tab.until(f"document.querySelector('.pill.ready') && {PROMPT} !== null")
    # The steps that this student takes: what loading the page has to fill in.
    tab.until("document.querySelectorAll('.steps input').length === 3")
    tab.run(f"{PROMPT}.select()")
    tab.type("a blue star")
    assert tab.run(f"{PROMPT}.value") == "a blue star"
    tab.run("document.querySelector('#go').click()")
    images = tab.until(f"(images => images.length === 2 && images)({SHOWN})")
    assert client.get(images[0]).content.startswith(b"\x89PNG") and images[0] != images[1]
    assert "50 steps" in tab.run("document.querySelector('.model-head').innerText")

    assert tab.complaints == []
    hosts = {
        urlsplit(url).netloc for url in tab.urls if urlsplit(url).scheme not in ("data", "blob", "about")
    }
    assert hosts == {live[0].netloc.decode()}
    assert len(tab.urls) > 10 and set(tab.statuses.values()) <= {200, 304}
