"""No image makes a program run: Pillow would hand an EPS to Ghostscript, whatever the file is called."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canaries import refusal
from PIL import EpsImagePlugin, Image

from evaluation.decoding import decode
from evaluation.files import open_images
from training.data.decoding import decoded
from training.data.folder import Folder

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Ghostscript was asked to run."""
    asked: list[Any] = []

    def run(*given: Any, **_: Any) -> Any:
        asked.append(given)
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    return asked


def test_pillow_would_have_run_it(started: list[Any]) -> None:
    with Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert started


def test_an_eps_is_refused_whatever_it_is_called(started: list[Any], tmp_path: Path) -> None:
    for name in ("a.eps", "a.png"):
        said = refusal(decode, EPS, name)
        assert said.startswith(f"{name} cannot be read as an image (it is none of PNG, JPEG, WEBP, BMP, GIF,")
    assert decoded(EPS, [(8, 8)]) == "unreadable image"
    (tmp_path / "a.png").write_bytes(EPS)
    assert "a.png cannot be read" in refusal(lambda: list(open_images(tmp_path)))
    assert "unreadable image" in refusal(Folder, Folder.Config(path=tmp_path))
    assert started == []


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_what_is_taken_is_still_read(form: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(buffer, form)
    assert abs(decode(buffer.getvalue(), "a").pixels.astype(int) - 90).max() < 3
    assert abs(decoded(buffer.getvalue(), [(8, 8)]).pixels.astype(int) - 90).max() < 3
