"""A teacher through our denoiser is the teacher in its stock pipeline."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import drawn_by_both, family_of, wide

from stepdistill.errors import UserError

# Their pipelines never call the network without the prompt.
UNGUIDED = ("flux2-dev", "flux2-distilled")


@pytest.mark.parametrize(
    ("variant", "guidance"),
    [*tiny.one_of_each_family(3), *(pytest.param(v, 1, marks=pytest.mark.slow) for v in tiny.VARIANTS)],
)
def test_the_teacher_equals_its_stock_pipeline(variant, guidance):
    if variant in UNGUIDED and guidance != 1:
        pytest.skip("the stock pipeline does not guide")
    family = family_of(variant)
    ours, theirs = drawn_by_both(family, tiny.directory(variant), guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_teacher_of_wide_images_equals_its_stock_pipeline(variant):
    family = wide(variant)
    ours, theirs = drawn_by_both(family, tiny.directory(variant), 1)
    assert tuple(theirs.shape[-2:]) == family.resolution
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_sides_that_are_not_whole_tokens_are_refused(variant):
    family = family_of(variant)
    height, width = family.resolution
    with pytest.raises(UserError, match=r"family\.resolution"):
        family_of(variant, resolution=[height + family.multiple // 2, width])
