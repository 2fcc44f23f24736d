"""What a request may be."""

from __future__ import annotations

import pytest

from app.request import MAX_SEED, Invalid, Limits, Request, clean, validate

TEACHER = Limits("teacher", "teacher", None, 50, guidance_free=False, default_guidance=3.0)
LIMITS = {"student": Limits(steps=(1, 2, 4)), "teacher": TEACHER}


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
    assert (request.steps, request.model, request.guidance_scale) == (1, "student", 1.0)
    assert 0 <= request.seed <= MAX_SEED
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
    assert "distilled without guidance" in refused("negative_prompt", negative_prompt="blur")
    assert ask(negative_prompt="blur", model="teacher", guidance_scale=3).negative_prompt == "blur"
    assert ask(model="teacher").guidance_scale == 3.0
    guided = Limits(guidance_free=False)
    assert validate(Request("x", "blur"), {"student": guided}).negative_prompt == "blur"


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
    assert "student, teacher" in refused("model", model="both")
    assert "Did you mean 'student'" in refused("model", model="studnet")


def test_of_a_model_that_is_not_loaded_only_what_holds_for_all_is_checked():
    catalog = {"student": None}
    early = validate({"prompt": " a  b ", "steps": 3}, catalog)
    assert (early.prompt, early.steps, early.guidance_scale) == ("a b", 3, None) and early.seed >= 0
    with pytest.raises(Invalid, match="2000"):
        validate({"prompt": "x" * 2001}, catalog)
    with pytest.raises(Invalid, match="trained for"):
        validate(early, LIMITS)


def test_classes_are_named():
    limits = {"student": Limits(conditions="class", class_names=("horse", "ship"))}
    assert validate(Request("ship"), limits).prompt == "ship"
    with pytest.raises(Invalid, match="Did you mean 'horse'"):
        validate(Request("hors"), limits)
    assert validate(Request(""), {"student": Limits(conditions="none")}).prompt == ""
