"""What a person may ask for, checked once for every door: page, HTTP, command line.

`validate` turns anything a client sent into a `Request` whose every field is in range, or raises an error
that names the field and the limit; nothing reaches a tokeniser or a network before it. pydantic checks what
holds for every model (names, types, fixed ranges), this module what the loaded models allow.

No torch and no gradio here, so the page can be built while the models load.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from stepdistill.errors import UserError, nearest

MAX_SEED = 2**32 - 1
# Characters of a prompt.
MAX_PROMPT = 2000
Text = StrictStr
Name = Annotated[StrictStr, Field(max_length=100)]
Count = Annotated[StrictInt, Field(ge=1)]
Seed = Annotated[StrictInt, Field(ge=-1, le=MAX_SEED)]
Guidance = Annotated[StrictFloat, Field(ge=1, allow_inf_nan=False)]
Strength = Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)]
# Where a request with a picture says none, as diffusers has it.
DEFAULT_STRENGTH = 0.8


def _picture_name(value: str) -> str:
    if value and not re.fullmatch("[0-9a-f]{64}", value):
        raise PydanticCustomError("picture", "")
    return value


# The sha256 of a file that the session has uploaded; "" is none.
PictureName = Annotated[StrictStr, AfterValidator(_picture_name)]


class Invalid(UserError):
    """A field of a request is wrong. `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    @classmethod
    def of(cls, error: ValidationError, fields: Mapping[str, Any]) -> Invalid:
        """The first of pydantic's complaints as one sentence; `fields` are those the request may have."""
        first = error.errors(include_url=False)[0]
        field = shown_name(first["loc"][0]) if first["loc"] else "body"
        kind, context = first["type"], first.get("ctx", {})
        if kind == "missing":
            return cls(field, f"{field} is missing.")
        if field not in fields:
            known = ", ".join(fields)
            return cls(field, f"{field!r} is not supported here; use {known}.{nearest(field, fields)}")
        expected = EXPECTED.get(kind) or f"must be {context.get('expected', 'of another type')}"
        return cls(field, f"{field} {expected.format(**context)}, got {shown(first['input'])}.")


# pydantic's names of what can be wrong with a value, in our words.
EXPECTED = {
    "int_type": "must be a whole number",
    "string_type": "must be text",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "string_pattern_mismatch": "must match {pattern}",
    "picture": "must be the sha256 of a picture that this session uploaded (POST /api/picture), never a path or an address",
    "bool_type": "must be true or false",
    "dict_type": "must be a JSON object",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le}",
}


class Busy(UserError):
    """The request was fine, but there is no room or no model for it now; it may be sent again.

    `retry_after` is in how many seconds.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(UserError):
    """The request was stopped, or a newer one of the same session took its place."""


@dataclass(frozen=True)
class Limits:
    """What a loaded model can do. Lengths in characters; `resolution` is (height, width) in pixels.

    `steps` are the counts it was trained for; None, of a model of many steps, is any up to `max_steps`. `no_picture` is why
    it cannot draw from a picture, "" where it can. `levels` are the noise levels that a few-step student was trained at.
    """

    name: str = "student"
    kind: str = "student"
    steps: tuple[int, ...] | None = (1,)
    default_steps: int = 1
    max_steps: int = 100
    guidance_free: bool = True
    default_guidance: float = 1.0
    max_guidance: float = 30.0
    max_prompt: int = MAX_PROMPT
    resolution: tuple[int, int] = (64, 64)
    # "prompt", "class" or "none".
    conditions: str = "prompt"
    class_names: tuple[str, ...] | None = None
    no_picture: str = "it has no image-to-image pipeline"
    levels: int | None = None

    @property
    def size(self) -> str:
        """ "WxH", as the HTTP API writes it."""
        return "{1}x{0}".format(*self.resolution)


@dataclass(frozen=True)
class Request:
    """One image wanted from one model.

    `model` is an id of the engine's catalog. `steps` is the number of sampling steps and `guidance_scale` is
    g in uncond + g (cond - uncond); None means the model's own. `seed` -1 is drawn by `validate`. `image` names a picture to
    draw from by the sha256 of its file, and `strength` in (0, 1] says how much of the way from noise is walked from it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Seed = -1
    steps: Count | None = None
    guidance_scale: Guidance | None = None
    model: Name = "student"
    image: PictureName = ""
    strength: Strength | None = None


_ANY_REQUEST = TypeAdapter(Request)


def check(asked: Request | Mapping[str, Any]) -> Request:
    """The request with every field of its type, in the range that holds for every model.

    Raises:
        Invalid: naming the field, the value and what is expected.
    """
    try:
        return _ANY_REQUEST.validate_python(dict(asked) if isinstance(asked, Mapping) else vars(asked))
    except ValidationError as error:
        raise Invalid.of(error, Request.__dataclass_fields__) from None


def validate(asked: Request | Mapping[str, Any], catalog: Mapping[str, Limits | None]) -> Request:
    """The request with clean text, a drawn seed and filled defaults, every field within its model's limits.

    catalog: the limits of every model by its id, None of one that is not loaded yet; what depends on them is
        then left for a second call.

    Raises:
        Invalid: naming the field, the value and the limit.
    """
    request = check(asked)
    if request.model not in catalog:
        raise Invalid(
            "model",
            f"model must be one of {', '.join(catalog)}, got {shown(request.model)}."
            f"{nearest(request.model, catalog)}",
        )
    limits = catalog[request.model]
    known = limits or Limits(conditions="none")
    request = replace(
        request,
        prompt=_condition(request.prompt, known),
        negative_prompt=_text("negative_prompt", request.negative_prompt, known),
        seed=secrets.randbelow(MAX_SEED + 1) if request.seed == -1 else request.seed,
    )
    request = _with_strength(request)
    if limits is None:
        return request
    _refuse_negative(request, limits)
    if request.image and limits.no_picture:
        raise Invalid("image", f"image cannot work with {limits.name}: {limits.no_picture}; leave it out.")
    steps, guidance = _steps(request, limits), _guidance(request, limits)
    return replace(request, steps=steps, guidance_scale=guidance)


def clean(text: str) -> str:
    """`text` in Unicode form NFC, spaces collapsed, without what cannot be seen.

    Control, format, surrogate and private-use characters go.
    A zero-width joiner stays where it joins symbols (emoji). Line breaks and tabs count as spaces.
    """
    kept = []
    text = unicodedata.normalize("NFC", text)
    for at, char in enumerate(text):
        category = unicodedata.category(char)
        joins = char == "\u200d" and kept and at + 1 < len(text)
        if joins and unicodedata.category(text[at + 1]) == "So" and unicodedata.category(kept[-1])[0] in "SM":
            kept.append(char)
        elif char.isspace():
            kept.append(" ")
        elif category not in ("Cc", "Cf", "Cs", "Co", "Cn"):
            kept.append(char)
    return " ".join("".join(kept).split())


def shown(value: Any) -> str:
    """A value as a message shows it: at most 40 characters."""
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def shown_name(name: Any) -> str:
    """A field's name as a message shows it, which may be anything a client made up."""
    return str(name)[:40].encode("ascii", "backslashreplace").decode()


def _text(name: str, value: str, limits: Limits) -> str:
    if len(value) > limits.max_prompt:
        raise Invalid(name, f"{name} must have at most {limits.max_prompt} characters, got {len(value)}.")
    return clean(value)


def _condition(prompt: str, limits: Limits) -> str:
    text = _text("prompt", prompt, limits)
    if limits.conditions == "none":
        return text
    if not text:
        raise Invalid("prompt", "prompt is empty; describe the image you want.")
    if limits.conditions == "class" and limits.class_names and text not in limits.class_names:
        raise Invalid(
            "prompt",
            f"prompt must be one of the {len(limits.class_names)} classes of this model, got {shown(text)}."
            f"{nearest(text, limits.class_names)}",
        )
    return text


def _with_strength(request: Request) -> Request:
    if not request.image and request.strength is not None:
        raise Invalid("strength", "strength says how far a picture is changed; send an image with it.")
    return replace(
        request, strength=DEFAULT_STRENGTH if request.image and request.strength is None else request.strength
    )


def _refuse_negative(request: Request, limits: Limits) -> None:
    if request.negative_prompt and limits.guidance_free:
        raise Invalid(
            "negative_prompt",
            f"negative_prompt cannot work with {limits.name}: it was distilled without guidance, so it has no "
            "second pass to steer away from; leave it empty or ask the teacher (model=teacher).",
        )


def _steps(request: Request, limits: Limits) -> int:
    steps = limits.default_steps if request.steps is None else request.steps
    if limits.steps is None and steps > limits.max_steps:
        raise Invalid(
            "steps", f"steps must be 1 to {limits.max_steps} for {limits.name}, got {shown(steps)}."
        )
    if limits.steps is not None and steps not in limits.steps:
        allowed = ", ".join(str(n) for n in limits.steps)
        raise Invalid(
            "steps",
            f"steps must be one of {allowed}, which {limits.name} was trained for, got {shown(steps)}.",
        )
    return steps


def _guidance(request: Request, limits: Limits) -> float:
    value = limits.default_guidance if request.guidance_scale is None else float(request.guidance_scale)
    if value > limits.max_guidance:
        most = f"{limits.max_guidance:g}"
        raise Invalid("guidance_scale", f"guidance_scale must be 1 to {most}, got {shown(value)}.")
    if limits.guidance_free and value != 1:
        raise Invalid(
            "guidance_scale",
            f"guidance_scale must be 1 for {limits.name}, which was distilled without guidance, "
            f"got {shown(value)}.",
        )
    return value
