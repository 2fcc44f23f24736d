"""The page in a real browser: what one types, clicks and sees, and that it asks nobody else."""

from __future__ import annotations

import base64
import json
import time
from urllib.parse import urlsplit

import httpx
import pytest
from app_browser import CHROMIUM, Tab
from app_clients import JOIN
from app_fakes import served

from app import png
from benchmarks import hostile

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
slow = pytest.mark.slow
PROMPT = "document.querySelector('#prompt')"
SHOTS = "[...document.querySelectorAll('#shots img')]"
LOADED = f"{SHOTS}.length > 0 && {SHOTS}.every(image => image.naturalWidth)"
FRESH = f"({LOADED}) && !document.querySelector('#shots').matches('.stale, .drawing')"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server whose teacher takes a second and a half, so that one can stop it."""
    folder = tmp_path_factory.mktemp("served")
    with served(folder, step=0.03) as (url, log):
        yield httpx.URL(url), log, folder


@pytest.fixture()
def tab(live, tmp_path):
    tab = Tab(tmp_path)
    tab.send("Page.navigate", url=str(live[0]))
    tab.until("document.querySelector('.pill.ready') !== null")
    tab.until(FRESH)
    yield tab
    assert tab.complaints == []
    tab.close()


def click(tab, selector):
    tab.run(f"document.querySelector({selector!r}).click()")


def write(tab, text):
    tab.run(f"{PROMPT}.select()")
    tab.type(text)


def settings(tab, at=0):
    """What the file of an image on the page says."""
    script = f"__files.get({SHOTS}[{at}].src).arrayBuffer().then(b => btoa(String.fromCharCode(...new Uint8Array(b))))"
    return json.loads(png.read_png(base64.b64decode(tab.run(script)))[1])


def hosts(tab):
    """Whom the page has asked."""
    return {urlsplit(url).netloc for url in tab.urls if urlsplit(url).scheme not in ("data", "blob", "about")}


def test_the_page_draws_by_itself_and_as_one_types_and_asks_nobody_else(tab, live):
    assert settings(tab)["prompt"].startswith("a small red circle")
    write(tab, "a blue star")
    tab.until(FRESH + f" && {SHOTS}[0].alt === 'a blue star'")
    assert tab.run(f"{PROMPT}.value") == "a blue star" and settings(tab)["prompt"] == "a blue star"
    assert hosts(tab) == {live[0].netloc.decode()}
    assert set(tab.statuses.values()) <= {200, 304}


@slow
def test_variations_differ_in_their_seeds_and_one_can_be_enlarged(tab):
    tab.run("document.querySelectorAll('#count input')[2].click()")
    tab.until(f"{SHOTS}.length === 8 && " + FRESH)
    first = settings(tab)["seed"]
    assert [settings(tab, at)["seed"] for at in range(8)] == list(range(first, first + 8))
    click(tab, "#shots .shot:nth-child(3)")
    assert str(first + 2) in tab.run("document.querySelector('#large p').textContent")
    tab.run("document.querySelector('#large').close()")


@slow
@pytest.mark.parametrize("after", [0.02, 0.06, 0.2])
def test_stop_ends_a_teacher_whenever_it_comes(tab, live, client, after):
    click(tab, "#tab-compare")
    click(tab, "#both")
    time.sleep(after)
    click(tab, "#stop")
    tab.until("!document.body.classList.contains('busy')", 5)
    time.sleep(0.3)
    assert client.get("/healthz").json()["queue"] == 0
    teacher = tab.run("document.querySelector('#pair .card .head').textContent")
    assert "50 steps" not in teacher and tab.run("document.querySelector('#ratio b')") is None


@slow
def test_a_pair_is_of_one_prompt_and_an_older_one_says_so(tab):
    click(tab, "#tab-compare")
    click(tab, "#both")
    tab.until("document.querySelector('#ratio b') !== null")
    assert tab.run("document.querySelectorAll('#pair .stale').length") == 0
    assert "median of 1 pair" in tab.run("document.querySelector('#ratio').textContent")
    write(tab, "a green cross")
    # No pair of another prompt stands there as if it were of this one.
    assert tab.run("document.querySelectorAll('#pair .stale').length") == 2
    assert "of other settings" in tab.run("document.querySelector('#pair').textContent")
    click(tab, "#both")
    tab.until("document.querySelector('#ratio').textContent.includes('median of 2 pairs')")
    alts = tab.run("[...document.querySelectorAll('#pair img')].map(image => image.alt)")
    assert len(alts) == 2 and all("a green cross" in alt for alt in alts)
    tab.run("document.querySelectorAll('#view input')[1].click()")
    tab.run("document.querySelector('#pair input').value = 20")
    tab.run("document.querySelector('#pair input').dispatchEvent(new Event('input'))")
    assert "80%" in tab.run("document.querySelector('#pair .over').style.clipPath")


@slow
def test_typing_makes_an_end_of_the_teacher(tab, client):
    click(tab, "#tab-compare")
    click(tab, "#both")
    tab.until("document.querySelectorAll('#pair img').length === 1", 20)
    write(tab, "a cyan circle")
    tab.until("!document.body.classList.contains('busy')", 10)
    assert tab.run("document.querySelectorAll('#pair img').length") == 1
    assert "stopped" in tab.run("document.querySelector('#pair .head').textContent")


@slow
def test_history_outlives_a_reload_and_restores_everything(tab):
    tab.run("document.querySelectorAll('#steps input')[1].click()")
    write(tab, "a purple diamond")
    click(tab, "#go")
    tab.until(FRESH + f" && {SHOTS}[0].alt === 'a purple diamond'")
    tab.until(
        "JSON.parse(localStorage.getItem('stepdistill-history-1') ?? '[]').some(e => e.settings.steps === 2)"
    )
    seed = settings(tab)["seed"]
    tab.send("Page.reload")
    tab.until("document.querySelector('.pill.ready') !== null")
    tab.until(FRESH)
    click(tab, "#tab-history")
    click(tab, ".old[aria-label*='purple diamond'][aria-label*='2 steps']")
    tab.until(FRESH + f" && {SHOTS}[0].alt === 'a purple diamond'")
    again = settings(tab)
    assert (again["prompt"], again["steps"], again["seed"]) == ("a purple diamond", 2, seed)
    click(tab, "#tab-history")
    click(tab, "#clear")
    assert tab.run("document.querySelectorAll('.old').length") == 0


@slow
def test_a_dropped_png_is_drawn_again_and_found_identical(tab):
    drop = f"""{{
      const data = new DataTransfer();
      data.items.add(new File([__files.get({SHOTS}[0].src)], 'a.png', {{type: 'image/png'}}));
      document.body.dispatchEvent(new DragEvent('drop', {{dataTransfer: data, bubbles: true, cancelable: true}}));
    }}"""
    tab.run(drop)
    tab.until("document.querySelector('#read').textContent.includes('identical')")
    tab.run(drop.replace(f"[__files.get({SHOTS}[0].src)]", "['<svg onload=alert(1)>']"))
    tab.until("document.querySelector('#read').textContent.includes('not a PNG')")
    # The browser notes our 400 by itself.
    tab.complaints = [c for c in tab.complaints if "400" not in json.dumps(c)]


@slow
def test_a_picture_is_dropped_drawn_from_read_back_and_cleared(tab):
    def drop(where):
        tab.run(f"""{{
          const data = new DataTransfer();
          data.items.add(new File([__files.get({SHOTS}[0].src)], 'a.png', {{type: 'image/png'}}));
          const how = {{dataTransfer: data, bubbles: true, cancelable: true}};
          document.querySelector({where!r}).dispatchEvent(new DragEvent('drop', how));
        }}""")

    hint = "document.querySelector('#picture-hint').textContent"
    drop("#picture-drop")
    tab.until("!document.querySelector('#picture-some').hidden && " + FRESH)
    assert not tab.run("document.querySelector('#create').hidden") and "level 3 of 4: 1 step" in tab.run(hint)
    first = settings(tab)
    assert len(first["image"]) == 64 and first["strength"] == 0.75
    tab.run("document.querySelector('#strength').focus()")
    for kind in ("keyDown", "keyUp"):
        tab.send(
            "Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37
        )
    tab.until(f"{hint}.includes('level 2 of 4') && " + FRESH)
    assert settings(tab)["strength"] == 0.5
    # Beside the picture's place a file is read back, and drawn again from the picture that is chosen.
    drop("body")
    tab.until("document.querySelector('#read').textContent.includes('identical')")
    click(tab, "#tab-create")
    click(tab, "#picture-clear")
    tab.until("document.querySelector('#picture-some').hidden && " + FRESH)
    assert "image" not in settings(tab)


@slow
def test_diversity_stands_beside_the_distance_with_its_protocol(tab):
    fd, ratio = "fd:scenes-v1", "diversity:scenes-v1/of_teacher"
    rows = [
        {"role": "teacher", "name": "t", "metrics": {fd: 4.0, "diversity:scenes-v1": 3.2}},
        {"role": "student", "name": "s", "metrics": {fd: 5.0, "diversity:scenes-v1": 2.8, ratio: 0.875, f"{ratio}/se": 0.06}},
    ]  # fmt: skip
    said = {"protocol": "scenes-2k[n=500]", "companion": "scenes-seeds[n=200]", "rows": rows}
    tab.run(f"window.__said = {json.dumps(said)}")
    tab.run("""{
      const ask = window.fetch;
      window.fetch = async (path, ...rest) => {
        const answer = await ask(path, ...rest);
        return path === "/api/metrics" ? Response.json({...await answer.json(), results: window.__said}) : answer;
      };
    }""")
    click(tab, "#tab-metrics")
    cells = "[...document.querySelectorAll('#metrics tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    tab.until(f"({cells}).length === 3")
    heads, *lines = tab.run(cells)
    assert heads[3:5] == [fd, ratio]
    assert [line[3:5] for line in lines] == [["4.00", ""], ["5.00", "0.875 ± 0.0600"]]
    assert "scenes-2k[n=500], diversity scenes-seeds[n=200]" in tab.run(
        "document.querySelector('#metrics').textContent"
    )


@slow
def test_no_text_becomes_a_script(tab):
    evil = "<img src=x onerror=window.__xss=1>"
    tab.send("Page.navigate", url="about:blank")
    base = next(url for url in tab.urls if url.startswith("http"))
    tab.send("Page.navigate", url=base + "#prompt=" + evil.replace(" ", "%20") + "&seed=3&model=%3Cb%3E")
    tab.until(f"({LOADED}) && {SHOTS}[0].alt.includes('onerror')")
    for part in ("compare", "history", "metrics", "training", "api"):
        click(tab, f"#tab-{part}")
        time.sleep(0.2)
    assert tab.run("window.__xss") is None and tab.run(f"{PROMPT}.value") == evil
    assert settings(tab)["prompt"] == evil


@slow
def test_a_phone_scrolls_one_way_and_has_targets_for_fingers(tab):
    for dark in (False, True):
        tab.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        tab.send(
            "Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True
        )
        for part in ("create", "compare", "history", "metrics", "training", "api"):
            click(tab, f"#tab-{part}")
            time.sleep(0.2)
            assert tab.run("document.documentElement.scrollWidth") == 390, part
            small = tab.run("""[...document.querySelectorAll('button, select, .chips label, summary, .switch')]
              .filter(e => e.checkVisibility() && !e.closest('.past'))
              .map(e => [e.id || e.className || e.textContent, e.getBoundingClientRect().height])
              .filter(([, height]) => height < 43.5)""")
            assert small == [], (part, small)
        shade = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (shade < 60) == dark


@slow
def test_the_keyboard_is_enough_and_everything_has_a_name(tab):
    tab.run("document.querySelector('#steps input:checked').focus()")
    for kind in ("keyDown", "keyUp"):
        tab.send(
            "Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
        )
    assert tab.run("document.querySelector('#steps input:checked').value") == "2"
    tab.run("document.querySelector('#tab-create').focus()")
    for kind in ("keyDown", "keyUp"):
        tab.send(
            "Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
        )
    assert tab.run("document.activeElement.id") == "tab-compare" and not tab.run(
        "document.querySelector('#compare').hidden"
    )
    click(tab, "#tab-create")
    nameless = tab.run("""[...document.querySelectorAll('button, input, select, textarea, a, img')]
      .filter(e => !(e.textContent.trim()
      || e.getAttribute('aria-label') || e.labels?.length || e.hasAttribute('alt'))).map(e => e.outerHTML)""")
    assert nameless == []


@slow
def test_the_page_says_when_the_server_is_gone_and_goes_on_when_it_is_back(tab):
    tab.send(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    tab.until("!document.querySelector('#gone').hidden", 15)
    tab.send(
        "Network.emulateNetworkConditions",
        offline=False,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    tab.until("document.querySelector('#gone').hidden", 15)
    assert tab.run("document.querySelector('.pill').className") == "pill ready"
    tab.complaints = [c for c in tab.complaints if "ERR_INTERNET_DISCONNECTED" not in json.dumps(c)]


def button(tab, name):
    """Click what stands on the page under a name."""
    found = f"[...document.querySelectorAll('button')].find(b => b.checkVisibility() && b.innerText.trim() === {name!r})"
    tab.until(f"{found} !== undefined", 30)
    tab.run(f"[{found}].map(b => b.click())")


@slow
def test_gradios_page_draws_compares_and_asks_nobody_else(tab, live):
    tab.send("Page.navigate", url=f"{live[0]}/gradio")
    # What the models take is there once they are.
    tab.until("document.body?.innerText.includes('1, 2, 4.')")
    button(tab, "Generate")
    tab.until("document.querySelector('.pixels img')?.naturalWidth")
    tab.run("document.querySelectorAll('button[role=tab]')[1].click()")
    button(tab, "Draw both")
    said = "[...document.querySelectorAll('textarea')].some(box => box.value.includes('times as long'))"
    tab.until(
        f"{said} && [...document.querySelectorAll('.pixels img')].filter(i => i.naturalWidth).length >= 2"
    )
    assert hosts(tab) == {live[0].netloc.decode()}


@slow
def test_nothing_is_drawn_for_a_client_of_gradio_that_has_gone(live, client):
    before = client.get("/healthz").json()["counts"].get("cancelled", 0)
    call = json.loads(hostile.call(1, "teacher")) | {"session_hash": "gone"}
    call["data"][2] = 100
    assert client.post("/gradio" + JOIN, json=call).status_code == 200
    with client.stream("GET", "/gradio/gradio_api/queue/data?session_hash=gone"):
        time.sleep(1.0)
    end = time.monotonic() + 10
    while client.get("/healthz").json()["counts"].get("cancelled", 0) == before:
        assert time.monotonic() < end
        time.sleep(0.1)
