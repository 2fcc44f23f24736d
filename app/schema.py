"""What a person may ask for, checked once for every door: page, HTTP, command line.

`validate` turns anything a client sent into a `Request` whose every field is in range, or raises an error
that names the field and the limit; nothing reaches a tokeniser or a network before it. The settings of an
image travel inside its PNG file as one text chunk (`KEY`), and what comes back in a file is treated as input
from a stranger.

No torch and no gradio here, so the page can be built while the models load.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from stepdistill.errors import UserError, nearest

KEY = "stepdistill"  # the PNG text chunk
VERSION = 1  # of the settings in it
MODELS = ("student", "teacher", "both")
MAX_SEED = 2**32 - 1
MAX_CHUNK = 16 * 1024  # bytes of settings read back from a file
MAX_DEPTH = 4  # nesting of those settings
MAX_PIXELS = 16_000_000  # of a file that is read back
MAX_FILE = 8 * 1024 * 1024  # bytes of such a file


class Invalid(UserError):
    """A field of a request is wrong. `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Busy(UserError):
    """The request was fine, but there is no room or no model for it now; it may be sent again."""


class Cancelled(UserError):
    """The request was stopped, or a newer one of the same session took its place."""


class NumericalFailure(UserError):
    """The networks gave NaN or infinity; there is no image."""


@dataclass(frozen=True)
class Limits:
    """What the loaded models can do. Lengths in characters; `resolution` is (height, width) in pixels."""

    steps: tuple[int, ...] = (1,)
    default_steps: int = 1
    teacher_steps: int = 50
    max_teacher_steps: int = 100
    guidance_free: bool = True
    student_guidance: float = 1.0
    teacher_guidance: float = 7.5
    max_guidance: float = 30.0
    max_prompt: int = 2000
    resolution: tuple[int, int] = (64, 64)
    conditions: str = "prompt"  # "prompt", "class" or "none"
    class_names: tuple[str, ...] | None = None
    student: str = "student"
    teacher: str | None = "teacher"  # None: no teacher is served


@dataclass(frozen=True)
class Request:
    """One image wanted from the student, the teacher, or both from the same noise.

    `steps` is the number of network passes of the student (of the teacher for model="teacher"); None means
    the model's own default. `guidance_scale` is g in uncond + g (cond - uncond); None means the model's own;
    in model="both" it is the teacher's where the student is guidance-free. `seed` -1 is drawn by `validate`.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    steps: int | None = None
    guidance_scale: float | None = None
    model: str = "student"


@dataclass(frozen=True)
class Shot:
    """One model's image, uint8 (H, W, 3), and the seconds it took: text, denoise and decode, and all three
    as `total`.
    """

    model: str
    name: str
    image: np.ndarray
    steps: int
    guidance_scale: float
    text: float
    denoise: float
    decode: float

    @property
    def total(self) -> float:
        return self.text + self.denoise + self.decode

    @property
    def timings(self) -> dict[str, float]:
        return {"text": self.text, "denoise": self.denoise, "decode": self.decode, "total": self.total}


@dataclass(frozen=True)
class Result:
    """The shots of a request, by model name, and the request as it was run (with the seed that was used).

    `queued` is the seconds the request waited for the worker; `about` is the engine's report, kept in the
    PNG.
    """

    request: Request
    shots: dict[str, Shot]
    queued: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """How many times faster the student was than the teacher, or None when only one ran."""
        if not {"student", "teacher"} <= self.shots.keys():
            return None
        return self.shots["teacher"].total / max(self.shots["student"].total, 1e-9)

    def png(self, model: str) -> bytes:
        """The image of `model` as a PNG file that carries the settings that made it."""
        return write_png(self.shots[model].image, self.settings(model))

    def settings(self, model: str) -> dict[str, Any]:
        """What is needed to make the image of `model` again."""
        shot = self.shots[model]
        request = replace(self.request, model=model, steps=shot.steps, guidance_scale=shot.guidance_scale)
        return {
            **settings(request),
            "made_by": shot.name,
            "seconds": {name: round(value, 4) for name, value in shot.timings.items()},
            "about": {
                key: value for key, value in self.about.items() if isinstance(value, (str, int, float))
            },
        }


# Checking ---------------------------------------------------------------------------------------------------


def validate(asked: Request | Mapping[str, Any], limits: Limits) -> Request:
    """The request with clean text, a drawn seed and filled defaults, every field within `limits`.

    Raises:
        Invalid: naming the field, the value and the limit.
    """
    if isinstance(asked, Mapping):
        known = set(Request.__dataclass_fields__)
        for key in asked:
            if key not in known:
                raise Invalid(
                    str(key)[:40], f"{str(key)[:40]!r} is not a field of a request.{nearest(key, known)}"
                )
        asked = Request(**asked)
    if not isinstance(asked.model, str) or asked.model not in MODELS:
        raise Invalid("model", f"model must be one of {', '.join(MODELS)}, got {_shown(asked.model)}.")
    if asked.model != "student" and limits.teacher is None:
        raise Invalid("model", f"model={asked.model} needs a teacher and none is loaded; use model=student.")

    seed = _integer("seed", asked.seed)
    if seed != -1 and not 0 <= seed <= MAX_SEED:
        raise Invalid("seed", f"seed must be -1 (random) or between 0 and {MAX_SEED}, got {_shown(seed)}.")
    return Request(
        prompt=_condition(asked.prompt, limits),
        negative_prompt=_negative(asked, limits),
        seed=secrets.randbelow(MAX_SEED + 1) if seed == -1 else seed,
        steps=_steps(asked, limits),
        guidance_scale=_guidance(asked, limits),
        model=asked.model,
    )


def clean(text: str) -> str:
    """`text` in Unicode form NFC without control, format, surrogate and private-use characters, spaces
    collapsed.

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


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _integer(name: str, value: Any) -> int:
    # bool is an int in Python, and 2.7 would be cut to 2 by int(): both are mistakes worth hearing about.
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise Invalid(name, f"{name} must be a whole number, got {_shown(value)}.")
    return int(value)


def _text(name: str, value: Any, limits: Limits) -> str:
    if not isinstance(value, str):
        raise Invalid(name, f"{name} must be text, got {_shown(value)}.")
    if len(value) > limits.max_prompt:
        raise Invalid(name, f"{name} must have at most {limits.max_prompt} characters, got {len(value)}.")
    return clean(value)


def _condition(prompt: Any, limits: Limits) -> str:
    text = _text("prompt", prompt, limits)
    if limits.conditions == "none":
        return text
    if not text:
        raise Invalid("prompt", "prompt is empty; describe the image you want.")
    if limits.conditions == "class" and limits.class_names and text not in limits.class_names:
        raise Invalid(
            "prompt",
            f"prompt must be one of the {len(limits.class_names)} classes of this model, got {_shown(text)}."
            f"{nearest(text, limits.class_names)}",
        )
    return text


def _negative(asked: Request, limits: Limits) -> str:
    text = _text("negative_prompt", asked.negative_prompt, limits)
    if text and asked.model != "teacher" and limits.guidance_free:
        raise Invalid(
            "negative_prompt",
            "negative_prompt cannot work with this student: it was distilled without guidance, so it has no "
            "second pass to steer away from; leave it empty or ask the teacher alone (model=teacher).",
        )
    return text


def _steps(asked: Request, limits: Limits) -> int:
    if asked.model == "teacher":
        steps = limits.teacher_steps if asked.steps is None else _integer("steps", asked.steps)
        if not 1 <= steps <= limits.max_teacher_steps:
            raise Invalid(
                "steps",
                f"steps must be 1 to {limits.max_teacher_steps} for the teacher, got {_shown(steps)}.",
            )
        return steps
    steps = limits.default_steps if asked.steps is None else _integer("steps", asked.steps)
    if steps not in limits.steps:
        allowed = ", ".join(str(n) for n in limits.steps)
        raise Invalid(
            "steps",
            f"steps must be one of {allowed}, which {limits.student} was trained for, got {_shown(steps)}.",
        )
    return steps


def _guidance(asked: Request, limits: Limits) -> float | None:
    value = asked.guidance_scale
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise Invalid("guidance_scale", f"guidance_scale must be a finite number, got {_shown(value)}.")
    # Compared and not asked `isfinite`, which fails for a whole number too large for a float.
    if not 1 <= value <= limits.max_guidance:
        raise Invalid(
            "guidance_scale", f"guidance_scale must be 1 to {limits.max_guidance:g}, got {_shown(value)}."
        )
    if asked.model == "student" and limits.guidance_free and value != 1:
        raise Invalid(
            "guidance_scale",
            f"guidance_scale must be 1 for {limits.student}, which was distilled without guidance, "
            f"got {_shown(value)}.",
        )
    return float(value)


# Settings and files -----------------------------------------------------------------------------------------


def settings(request: Request) -> dict[str, Any]:
    """The request as plain JSON values, with the version of their meaning."""
    return {"version": VERSION, **asdict(request)}


def from_settings(text: str | bytes, limits: Limits | None = None) -> Request:
    """The request in settings JSON, `validate`d when `limits` are given. Keys that say how it was made are
    ignored.

    Raises:
        UserError: too large, too deep, not JSON, of another version, or a field out of range.
    """
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if len(raw) > MAX_CHUNK:
        raise UserError(f"the settings have {len(raw)} bytes, more than the {MAX_CHUNK} allowed.")
    if _depth(raw) > MAX_DEPTH:
        raise UserError(f"the settings are nested deeper than {MAX_DEPTH} levels.")
    try:
        values = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the settings are not valid JSON ({str(error)[:80]}).") from None
    if not isinstance(values, dict):
        raise UserError("the settings must be a JSON object.")
    if values.get("version") != VERSION:
        raise UserError(
            f"the settings have version {_shown(values.get('version'))}; this program reads {VERSION}."
        )
    request = Request(**{key: values[key] for key in Request.__dataclass_fields__ if key in values})
    return validate(request, limits) if limits else request


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _depth(raw: bytes) -> int:
    """The nesting of JSON text, counted without a parser, which a deep file could exhaust.

    Strings do not count.
    """
    deepest = level = 0
    for char in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", raw, flags=re.DOTALL):
        level += (char in b"[{") - (char in b"]}")
        deepest = max(deepest, level)
    return deepest


def write_png(image: np.ndarray, values: Mapping[str, Any] | None = None) -> bytes:
    """PNG bytes of a uint8 (H, W, 3) image, with `values` as JSON in text chunk `KEY`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=png_info(values) if values else None, compress_level=1)
    return buffer.getvalue()


def png_info(values: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """The text chunk for `Image.save(pnginfo=...)`."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(values))
    return info


def read_png(data: bytes) -> tuple[np.ndarray, str | None]:
    """Pixels, uint8 (H, W, 3), and the settings text of a PNG file, or None when it carries none.

    The size is read from the header before anything is decoded, and text chunks are walked by hand: Pillow
    would inflate a compressed one of any size first.

    Raises:
        UserError: not a PNG, too large, truncated, or its settings are too long.
    """
    if len(data) > MAX_FILE:
        raise UserError(f"the file has {len(data)} bytes, more than the {MAX_FILE} allowed.")
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 33 or data[12:16] != b"IHDR":
        raise UserError("the file is not a PNG image; drop an image that was downloaded from this page.")
    width, height = struct.unpack(">II", data[16:24])
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"the image has {width}x{height} pixels, more than the {MAX_PIXELS} allowed.")
    text, kept = _text_chunk(data)
    try:
        with Image.open(io.BytesIO(kept), formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the PNG file is damaged ({str(error)[:80]}).") from None
    return pixels, text


def _text_chunk(data: bytes) -> tuple[str | None, bytes]:
    """The text of chunk `KEY`, and the file without any text chunk."""
    text, kept, at = None, [data[:8]], 8
    while at + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, value = body.partition(b"\0")
            if kind == b"tEXt" and keyword == KEY.encode() and text is None:
                if len(value) > MAX_CHUNK:
                    raise UserError(
                        f"the file's settings have {len(value)} bytes, more than the {MAX_CHUNK} allowed."
                    )
                text = value.decode("latin-1")
        else:
            kept.append(data[at : at + 12 + size])
        at += 12 + size
    return text, b"".join(kept)
