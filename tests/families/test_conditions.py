"""Text encoders leave memory once all prompts are encoded: the conditions stay as they were, and the encoders come back."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import family_of

from stepdistill.denoiser import map_cond
from training.encoded import Conditions, forget

KNOWN, OTHER = ["a red circle above a blue square", "", "a cat"], ["two dogs", "a red circle"]


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_conditions_are_the_same_from_shards_and_from_encoders_that_came_back(variant, tmp_path):
    family = family_of(variant)
    if not family.has_text:
        assert family.conditions == "class"
        return
    before = [family.encode(KNOWN), family.uncond(2), family.encode(OTHER), family.encode_negative(["a dog"])]
    key = family.text_key()
    Conditions(family, [KNOWN], tmp_path).fill(len(KNOWN), progress=False).answer()
    assert set(family.modules()) == {"decoder"} and family.text_key() == key
    after = [family.encode(KNOWN), family.uncond(2)]
    assert set(family.modules()) == {"decoder"}
    # Prompts it has not seen.
    after += [family.encode(OTHER), family.encode_negative(["a dog"])]
    for one, other in zip(before, after, strict=True):
        map_cond(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), one, other)
    forget(family)
    family._key = ""
    assert family.text_key() == key
