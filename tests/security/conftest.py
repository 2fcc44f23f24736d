"""A module that leaves a trace when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from canaries import CANARY


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `canary` that can be imported; what it leaves behind when it runs."""
    trace, made = tmp_path / "ran", tmp_path / "made"
    (tmp_path / "canary.py").write_text(CANARY.format(trace=str(trace), made=str(made)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)
    yield trace
    sys.modules.pop("canary", None)
