"""What `make mutants` would change is still there to be changed."""

from __future__ import annotations

import pytest
from mutants.__main__ import ROOT, listed


@pytest.mark.parametrize("file", sorted({change.file for change in listed()}))
def test_every_listed_change_names_one_place(file):
    changes = [change for change in listed() if change.file == file]
    text = changes[0].path.read_text()
    assert [change.old for change in changes if text.count(change.old) != 1] == []
    for change in changes:
        for test in change.tests:
            assert (ROOT / "tests" / test).is_file(), test
