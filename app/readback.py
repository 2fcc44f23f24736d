"""A PNG read back: the settings inside it, whether they can be drawn here, and whether they give the same image."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from app import png, settings, strict_json
from app.answers import png64, results_of
from app.catalog import Entry
from app.request import DEFAULT_STRENGTH, Invalid, Request, shown
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from app.engine import Engine


def read(data: bytes, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What a PNG file says: "settings" for the form, and in "notes" what could not be taken over.

    Raises:
        Invalid: the file is none that can be read, or its settings are none.
    """
    return _read(data, entries)[0]


async def reproduce(
    data: bytes, engine: Engine, gone: Callable[[], Awaitable[bool]], session: str | None = None
) -> dict[str, Any]:
    """The image that the settings of a PNG file give here, and how far it is from the file's.

    session: whose pictures are drawn from, where it was drawn from one.

    Raises:
        Invalid: as `read`, or the session has not uploaded that picture. UserError: whatever drawing raises.
    """
    said, pixels, request = await asyncio.to_thread(_read, data, engine.entries)
    if request is None:
        raise Invalid("file", " ".join(said["notes"]))
    picture = engine.pictures.get(session, request.image) if request.image else None
    (result,) = await results_of([engine.submit(request, picture=picture)], gone)
    return {**said, **_compared(pixels, result.image), "png": await asyncio.to_thread(png64, result)}


def _read(data: bytes, entries: Mapping[str, Entry]) -> tuple[dict[str, Any], np.ndarray, Request | None]:
    try:
        return _parts(data, entries)
    except UserError as error:
        raise Invalid("file", str(error)) from None


def _parts(data: bytes, entries: Mapping[str, Entry]) -> tuple[dict[str, Any], np.ndarray, Request | None]:
    pixels, text = png.read_png(data)
    if text is None:
        note = "this PNG carries no settings of stepdistill; only its pixels could be read."
        return {"settings": None, "notes": [note]}, pixels, None
    values = _values(text)
    asked = settings.from_settings(text)
    notes, about = [], values.get("about") if isinstance(values.get("about"), dict) else {}
    wanted = about.get("sha256") if isinstance(about.get("sha256"), str) else None
    same = [name for name, entry in entries.items() if wanted and entry.about.get("sha256") == wanted]
    if same:
        asked = Request(**{**vars(asked), "model": same[0]})
    else:
        made_by = shown(values.get("made_by", asked.model))
        notes.append(
            f"the model that drew it ({made_by}) is not served here, or is not loaded yet; "
            "another gives another image."
            if wanted
            else f"it does not say which weights drew it ({made_by})."
        )
        if asked.model not in entries:
            asked = Request(**{**vars(asked), "model": next(iter(entries))})
    if asked.image:
        strength = DEFAULT_STRENGTH if asked.strength is None else asked.strength
        asked = Request(**{**vars(asked), "strength": strength})
        notes.append(
            f"it was drawn from a picture (sha256 {asked.image[:12]}...) at strength {asked.strength:g}, which no file "
            "holds: choose that picture to draw it again."
        )
    return {"settings": settings.settings(asked), "notes": notes}, pixels, asked


def _values(text: str) -> dict[str, Any]:
    try:
        return strict_json.loads(text.encode("utf-8", "replace"), settings.MAX_DEPTH)
    except ValueError as error:
        raise UserError(f"the settings cannot be read: {error}.") from None


def _compared(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    if one.shape != other.shape:
        return {"identical": False, "said": f"the sizes differ: {one.shape[:2]} and {other.shape[:2]}."}
    difference = np.abs(one.astype(int) - other)
    if not difference.any():
        return {"identical": True, "said": "identical: every byte of the image is the same."}
    share = (difference > 0).mean()
    return {
        "identical": False,
        "said": f"differs by at most {difference.max()} of 255 levels, in {100 * share:.2f} % of the values.",
    }
