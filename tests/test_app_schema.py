"""What a request may be, and what settings read back from a file may do."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest

from app import schema
from app.schema import Invalid, Limits, Request, Result, Shot, clean, validate
from stepdistill.errors import UserError

LIMITS = Limits(steps=(1, 2, 4), teacher_steps=50)
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def ask(**fields):
    return validate({"prompt": "a red circle", **fields}, LIMITS)


def refused(field, **fields):
    with pytest.raises(Invalid) as caught:
        ask(**fields)
    assert caught.value.field == field
    assert field in str(caught.value)
    return str(caught.value)


def test_defaults_are_filled_and_the_seed_is_drawn():
    request = ask()
    assert (request.steps, request.model, request.guidance_scale) == (1, "student", None)
    assert 0 <= request.seed <= schema.MAX_SEED
    assert len({ask().seed for _ in range(20)}) > 1
    assert ask(seed=7).seed == 7
    assert validate(request, LIMITS) == request


@pytest.mark.parametrize("steps", [0, -1, 3, 4000, 2.0, 2.7, "2", True, [1], {}, float("nan")])
def test_steps_are_whole_numbers_the_student_knows(steps):
    refused("steps", steps=steps)


def test_steps_name_what_is_allowed():
    assert "1, 2, 4" in refused("steps", steps=3)
    assert ask(steps=4).steps == 4
    assert ask(model="teacher").steps == 50
    assert "1 to 100" in refused("steps", steps=101, model="teacher")


@pytest.mark.parametrize(
    "seed", [-2, 2**32, 2**63, 2**64, 10**40, 1e30, 1.0, float("nan"), float("inf"), "7", True, None]
)
def test_seeds_are_whole_numbers_in_range(seed):
    assert len(refused("seed", seed=seed)) < 200


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5, -1, 31, "3", True])
def test_guidance_is_finite_and_in_range(value):
    refused("guidance_scale", guidance_scale=value, model="teacher")


def test_a_guidance_free_student_refuses_guidance_and_negative_prompts_with_the_reason():
    assert "without guidance" in refused("guidance_scale", guidance_scale=3.0)
    for model in ("student", "both"):
        assert "distilled without guidance" in refused("negative_prompt", negative_prompt="blur", model=model)
    assert ask(negative_prompt="blur", model="teacher", guidance_scale=3).negative_prompt == "blur"
    assert ask(guidance_scale=3.0, model="both").guidance_scale == 3.0
    guided = Limits(guidance_free=False)
    assert validate(Request("x", "blur"), guided).negative_prompt == "blur"


@pytest.mark.parametrize(
    "prompt", ["", "   ", "\u200b\u200d", "\x00\x07", "\u202e", "\ud800", None, 3, ["x"]]
)
def test_a_prompt_of_nothing_is_refused(prompt):
    refused("prompt", prompt=prompt)


def test_prompts_are_cleaned():
    assert clean("a\tred\n\ncircle\u0000 \u202eof\u200b light") == "a red circle of light"
    assert clean("e\u0301") == "\u00e9"
    family = "\U0001f468\u200d\U0001f469"
    assert clean(family) == family
    assert clean("a\ud800b") == "ab"


def test_a_prompt_has_at_most_2000_characters():
    assert ask(prompt="x" * 2000).prompt == "x" * 2000
    message = refused("prompt", prompt="x" * 10_000_000)
    assert "2000" in message and "10000000" in message and len(message) < 200


def test_models_and_fields_are_known_ones():
    refused("model", model="../../etc")
    refused("model", model=None)
    with pytest.raises(Invalid, match="Did you mean 'steps'"):
        ask(step=1)
    with pytest.raises(Invalid, match="needs a teacher"):
        validate(Request("x", model="both"), Limits(teacher=None))


def test_classes_are_named():
    limits = Limits(conditions="class", class_names=("horse", "ship"))
    assert validate(Request("ship"), limits).prompt == "ship"
    with pytest.raises(Invalid, match="Did you mean 'horse'"):
        validate(Request("hors"), limits)
    assert validate(Request(""), Limits(conditions="none")).prompt == ""


# Files
# ------------------------------------------------------------------------------------------------------------


def result(**fields):
    request = validate(Request("a red circle [[[[[[ \u00e9", seed=3, model="both"), LIMITS)
    shots = {
        "student": Shot("student", "s", IMAGE, 1, 1.0, 0.001, 0.01, 0.009),
        "teacher": Shot("teacher", "t", IMAGE, 50, 3.0, 0.001, 0.9, 0.099),
    }
    return Result(request, shots, about={"dtype": "float32", "nested": {"not": "kept"}})


def test_a_png_gives_back_its_pixels_and_settings():
    made = result()
    pixels, text = schema.read_png(made.png("student"))
    assert np.array_equal(pixels, IMAGE)
    again = schema.from_settings(text, LIMITS)
    assert (again.prompt, again.seed, again.steps, again.model) == (made.request.prompt, 3, 1, "student")
    teacher = schema.from_settings(schema.read_png(made.png("teacher"))[1], LIMITS)
    assert (teacher.model, teacher.steps, teacher.guidance_scale) == ("teacher", 50, 3.0)
    assert json.loads(text)["about"] == {"dtype": "float32"}
    assert schema.read_png(schema.write_png(IMAGE))[1] is None


def test_the_speedup_is_the_ratio_of_the_totals():
    assert result().speedup == pytest.approx(1.0 / 0.02)
    assert Result(Request(), {"student": result().shots["student"]}).speedup is None


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "nonsense",
        '{"version": 99}',
        '{"version": 1, "prompt": "x", "steps": 9999}',
        '{"version": 1, "prompt": "x", "steps": NaN}',
        '{"version": 1, "prompt": "x", "model": "../../x"}',
        '{"version": 1, "prompt": {"a": 1}}',
        "[" * 8000,
        '{"a":' * 3000,
        '{"version": 1, "prompt": "' + "x" * 20_000 + '"}',
    ],
)
def test_forged_settings_are_refused(text):
    with pytest.raises(UserError) as caught:
        schema.from_settings(text, LIMITS)
    assert len(str(caught.value)) < 300


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(extra):
    png = schema.write_png(IMAGE)
    return png[:33] + extra + png[33:]


def test_hostile_files_are_refused_before_they_cost_anything():
    bomb = with_chunk(b"")
    bomb = bomb[:16] + struct.pack(">II", 50_000, 50_000) + bomb[24:]
    long = with_chunk(chunk(b"tEXt", b"stepdistill\0" + b"x" * 20_000))
    for data, why in [
        (b"", "not a PNG"),
        (b"<svg onload=alert(1)>", "not a PNG"),
        (b"\xff\xd8\xff" + b"0" * 100, "not a PNG"),
        (bomb, "50000x50000"),
        (schema.write_png(IMAGE)[:200], "damaged"),
        (long, "20000 bytes"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * schema.MAX_FILE, "bytes"),
    ]:
        with pytest.raises(UserError, match=why):
            schema.read_png(data)


def test_compressed_text_is_never_inflated():
    inflated = zlib.compress(b"0" * 50_000_000)
    data = with_chunk(
        chunk(b"zTXt", b"stepdistill\0\0" + inflated) + chunk(b"iTXt", b"stepdistill\0\1\0\0\0" + inflated)
    )
    pixels, text = schema.read_png(data)
    assert text is None and np.array_equal(pixels, IMAGE)
