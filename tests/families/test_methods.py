"""Family x method: an optimiser step of each phase, or the reason why not. `models_table.py` publishes the same."""

from __future__ import annotations

import pytest
import tiny
from models import refused

from stepdistill.methods import METHODS


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_pair(variant, name):
    why = refused(variant, name)
    assert not why or "networks cannot be told" in why or "reads captions" in why, why


@pytest.mark.parametrize(("variant", "name"), tiny.one_of_each_family("dmd2"))
def test_the_gan_of_dmd2_trains_on_every_family(variant, name):
    assert not refused(variant, name, gan_weight=1e-2)
