"""The settings of an image as JSON. What comes back in a file is treated as input from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from app import strict_json
from app.request import Limits, Request, check, shown, validate
from stepdistill.errors import UserError

# Of the meaning of the settings.
VERSION = 1
# Bytes of settings read back from a file, and how deep they may be nested.
MAX_BYTES = 16 * 1024
MAX_DEPTH = 4


def settings(request: Request) -> dict[str, Any]:
    """The request as plain JSON values, with the version of their meaning.

    Of a picture it was drawn from they hold the name, a sha256, and never a pixel.
    """
    values = asdict(request)
    for name in ("image", "strength") if not request.image else ():
        del values[name]
    return {"version": VERSION, **values}


def from_settings(text: str | bytes, catalog: Mapping[str, Limits | None] | None = None) -> Request:
    """The request in settings JSON, `validate`d when a `catalog` is given.

    Keys that say how the image was made are passed over.

    Raises:
        UserError: too large, too deep, not JSON, of another version, or a field out of range.
    """
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise UserError(f"the settings have {len(raw)} bytes, more than the {MAX_BYTES} allowed.")
    try:
        values = strict_json.loads(raw, MAX_DEPTH)
    except ValueError as error:
        raise UserError(f"the settings cannot be read: {error}.") from None
    if values.get("version") != VERSION:
        raise UserError(
            f"the settings have version {shown(values.get('version'))}; this program reads {VERSION}."
        )
    request = check({key: values[key] for key in Request.__dataclass_fields__ if key in values})
    return request if catalog is None else validate(request, catalog)
