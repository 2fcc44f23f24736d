"""Pictures to draw from: whose they are, what is no picture, and what is kept of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of
from PIL import Image
from starlette.testclient import TestClient

from app import pictures, png
from app.catalog import Entry
from app.http import create_app
from app.model import Model
from app.request import Invalid, Limits, Request, validate
from app.settings import from_settings
from stepdistill import assets, load

PROMPT = "a red circle"
COLOURS = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def file(pixels=COLOURS, kind="PNG", **how):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **how)
    return out.getvalue()


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(create_app(engine, gradio=False), base_url="http://localhost") as client:
        yield client


def upload(client, data, session="mine"):
    headers = {"x-session": session, "content-type": "application/octet-stream"}
    return client.post("/api/picture", content=data, headers=headers)


def drawn(client, session="mine", **request):
    body = {"request": {"prompt": PROMPT, "seed": 3, **request}, "session": session, "number": 1}
    answer = client.post("/api/generate", json=body)
    if answer.status_code != 200:
        return answer
    line = json.loads(answer.text.splitlines()[-1])
    return base64.b64decode(line["png"]), line["settings"]


def said(answer):
    error = answer.json()["error"]
    assert error["message"].endswith(".") and "\n" not in error["message"]
    return answer.status_code, error["param"], error["message"]


# A picture --------------------------------------------------------------------------------------------------


def test_every_kind_is_read_and_what_shows_through_is_white():
    for kind in ("PNG", "WEBP"):
        how = {"lossless": True} if kind == "WEBP" else {}
        data = file(kind=kind, **how)
        picture = pictures.opened(data)
        assert np.array_equal(picture.pixels, COLOURS)
        assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert pictures.opened(file(kind="JPEG")).pixels.shape == COLOURS.shape
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (pictures.opened(file(clear)).pixels == 255).all()
    turned = Image.Exif()
    turned[274] = 6
    assert pictures.opened(file(kind="JPEG", exif=turned)).pixels.shape == (60, 40, 3)


def test_it_covers_a_model_s_size_and_is_cut_evenly():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert pictures.opened(file(wide)).fitted((20, 20))[:, 4:-4].min() > 240
    large = pictures.opened(file(np.zeros((1500, 4000, 3), np.uint8)))
    assert large.pixels.shape[0] * large.pixels.shape[1] <= pictures.KEPT_PIXELS
    assert large.fitted((64, 32)).shape == (64, 32, 3)


def bomb(side=50_000):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no picture; give a PNG, JPEG or WebP"),
        (b"<svg onload=alert(1)>", "no picture"),
        (b"/etc/passwd", "no picture"),
        (b"GIF89a" + bytes(100), "no picture"),
        (file()[:200], "damaged or cut off"),
        (file(kind="JPEG")[:60], "damaged or cut off"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged or cut off"),
        (bomb(), "more than the 16000000 pixels allowed"),
        (bomb(5000), "5000x5000 pixels, more than the 16000000 allowed"),
        (b"\xff\xd8\xff" + bytes(png.MAX_FILE), "bytes, more than the 8388608 allowed"),
    ],
    ids=["empty", "svg", "path", "gif", "half a png", "half a jpeg", "zeros", "bomb", "small bomb", "large"],
)
def test_what_is_no_picture_is_one_sentence(client, data, why):
    status, field, message = said(upload(client, data))
    assert (status, field) == (400, "image") and why in message


def test_an_upload_is_capped_before_it_is_read(client):
    assert upload(client, bytes(png.MAX_FILE + 65 * 1024)).status_code == 413


@pytest.mark.parametrize("session", ["", "../x", "a" * 65])
def test_an_upload_says_whose_it_is(client, session):
    assert said(upload(client, file(), session))[:2] == (400, "x-session")


# Drawing from it --------------------------------------------------------------------------------------------


def test_a_picture_is_drawn_from_and_its_file_holds_its_name_alone(client):
    name = upload(client, file()).json()
    assert name == {"sha256": hashlib.sha256(file()).hexdigest(), "width": 60, "height": 40}
    data, settings = drawn(client, image=name["sha256"], strength=0.5)
    assert (settings["image"], settings["strength"]) == (name["sha256"], 0.5)
    pixels, text = png.read_png(data)
    assert from_settings(text).image == name["sha256"] and len(text) < 1024
    assert not np.array_equal(pixels, png.read_png(drawn(client)[0])[0])
    # At full strength nothing of it is left.
    whole = drawn(client, image=name["sha256"], strength=1.0)[0]
    assert np.array_equal(png.read_png(whole)[0], png.read_png(drawn(client)[0])[0])
    assert drawn(client, image=name["sha256"])[1]["strength"] == 0.8
    # What has none says nothing of it.
    assert {"image", "strength"} & set(drawn(client)[1]) == set()


def test_a_picture_of_another_session_is_not_found(client):
    name = upload(client, file()).json()["sha256"]
    for session, wanted in (("other", name), ("mine", "0" * 64)):
        status, field, message = said(drawn(client, session, image=wanted, strength=0.5))
        assert (status, field) == (400, "image") and "upload it first" in message


@pytest.mark.parametrize("image", ["/etc/passwd", "http://127.0.0.1/a.png", "../a", "A" * 64, "0" * 63, 7])
def test_an_image_is_a_name_and_no_path_or_address(client, image):
    assert said(drawn(client, image=image))[:2] == (400, "image")


@pytest.mark.parametrize("strength", [0, -1, 1.5, "0.5", True])
def test_strength_out_of_range_is_refused(client, strength):
    name = upload(client, file()).json()["sha256"]
    assert said(drawn(client, image=name, strength=strength))[:2] == (400, "strength")
    assert "send an image with it" in said(drawn(client, strength=0.5))[2]


def test_a_model_that_draws_from_none_says_why():
    limits = {"student": Limits(name="s", no_picture="it was trained at one noise level alone")}
    with pytest.raises(Invalid, match="image cannot work with s: it was trained at one noise level alone"):
        validate(Request(PROMPT, image="0" * 64), limits)
    # Of one that is not loaded yet it is unknown.
    assert validate(Request(PROMPT, image="0" * 64), {"student": None}).strength == 0.8


def test_pictures_of_different_users_share_a_batch_and_others_do_not():
    student = FakeSampler("student")
    engine = engine_of(student, False)
    try:
        engine._runner.cap = lambda model: 8
        engine.models.loaded["student"].sizes = (1, 4)
        one, two = (pictures.opened(file(np.full((8, 8, 3), shade, np.uint8))) for shade in (10, 200))
        student.gate.clear()
        student.began.clear()
        first = engine.submit(Request(PROMPT, seed=0))
        assert student.began.wait(5)
        jobs = [
            engine.submit(Request(PROMPT, seed=1, image=p.sha256, strength=s), picture=p)
            for p, s in ((one, 0.5), (two, 0.5), (one, 0.25))
        ]
        plain = engine.submit(Request(PROMPT, seed=1))
        student.gate.set()
        batches = [job.future.result(5).batch for job in (first, *jobs, plain)]
        assert batches == [1, 2, 2, 1, 1]
        images = [job.future.result(5).image for job in (*jobs, plain)]
        assert all(not np.array_equal(images[0], image) for image in images[1:])
        alone = engine.generate(Request(PROMPT, seed=1, image=one.sha256, strength=0.5), picture=one)
        assert np.array_equal(alone.image, images[0])
    finally:
        engine.close()


def test_each_picture_has_latents_of_its_own():
    """A model remembers what it has encoded."""
    path = assets.path("student")
    model = Model(Entry("student", path, "student"), load(path), "auto")
    request = Request(PROMPT, seed=3, steps=1, guidance_scale=1.0, strength=0.5)
    one, other = (pictures.opened(file(pixels)) for pixels in (COLOURS, 255 - COLOURS))
    first, second, again = (model.draw([request], pictures=[each])[0][0] for each in (one, other, one))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_pictures_are_bounded_by_session_and_in_all(monkeypatch):
    kept = pictures.Pictures()
    made = [pictures.Picture(str(i), np.zeros((10, 10, 3), np.uint8)) for i in range(6)]
    for picture in made:
        kept.add("mine", picture)
    with pytest.raises(Invalid, match="has no picture"):
        kept.get("mine", "1")
    assert kept.get("mine", "2") is made[2] and kept.get("mine", "5") is made[5]
    monkeypatch.setattr(pictures, "MAX_BYTES", 3 * made[0].pixels.nbytes)
    kept.add("other", made[0])
    with pytest.raises(Invalid):
        kept.get("mine", "3")
    assert kept.get("mine", "2") and kept.get("other", "0")


# Files made from it -----------------------------------------------------------------------------------------


def test_a_file_is_drawn_again_by_whoever_has_its_picture(client):
    name = upload(client, file()).json()["sha256"]
    data, _ = drawn(client, image=name, strength=0.5)
    notes = client.post("/api/read", content=data).json()["notes"]
    assert any(f"sha256 {name[:12]}" in note and "choose that picture" in note for note in notes)
    for headers in ({}, {"x-session": "other"}):
        status, field, message = said(client.post("/api/reproduce", content=data, headers=headers))
        assert (status, field) == (400, "image") and name[:12] in message
    again = client.post("/api/reproduce", content=data, headers={"x-session": "mine"}).json()
    assert again["identical"] is True


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"image": "0" * 64}, 200),
        ({"image": "../a"}, 400),
        ({"image": "0" * 64, "strength": 7}, 400),
        ({"strength": 0.5}, 200),
    ],
)
def test_forged_settings_of_a_picture_are_checked(client, values, status):
    forged = png.write_png(COLOURS, {"version": 1, "prompt": PROMPT, "seed": 1, **values})
    answer = client.post("/api/read", content=forged)
    assert answer.status_code == status
    if values == {"image": "0" * 64}:
        assert answer.json()["settings"]["strength"] == 0.8
    assert client.post("/api/reproduce", content=forged, headers={"x-session": "mine"}).status_code == 400


# The form of OpenAI -----------------------------------------------------------------------------------------


def edits(client, files=None, **fields):
    files = files if files is not None else {"image": ("a.png", file(), "image/png")}
    return client.post("/v1/images/edits", data={"prompt": PROMPT, **fields}, files=files)


def test_a_form_draws_what_the_page_does(client):
    answer = edits(client, seed="3", strength="0.5", n="2").json()["data"]
    name = upload(client, file()).json()["sha256"]
    page = drawn(client, image=name, strength=0.5)[0]
    assert [row["seed"] for row in answer] == [3, 4]
    ours = base64.b64decode(answer[0]["b64_json"])
    assert np.array_equal(png.read_png(ours)[0], png.read_png(page)[0])
    # A prompt stays text.
    assert edits(client, prompt="7").status_code == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"files": {"image": ("a.png", b"GIF89a", "image/png")}}, "image"),
        ({"files": {"other": ("a.png", file(), "image/png")}}, "other"),
        ({"files": {"image": ("a", file()), "mask": ("b", file())}}, "mask"),
        ({"seed": "9" * 400}, "seed"),
        ({"strength": "nan"}, "strength"),
        ({"strength": "2"}, "strength"),
        ({"lora": "x"}, "lora"),
        ({"image": "/etc/passwd"}, "image"),
        ({"n": "9"}, "n"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value))[:20],
)
def test_forms_are_checked_as_json_is(client, change, field):
    assert said(edits(client, **change))[:2] == (400, field)


def test_what_is_no_form_is_one_sentence(client):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert said(client.post("/v1/images/edits", json={}))[1] == "content-type"
    assert said(client.post("/v1/images/edits", content=b"--y", headers=headers))[0] == 400
    assert said(client.post("/v1/images/edits", content=b"--x--\r\n", headers=headers))[1] == "image"
    assert upload(client, os.urandom(1000)).status_code == 400
