"""Z-Image: prompts of their own length, its scale of guidance, and the positions it knows."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import drawn_by_both, family_of

from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.schedule import times_like

PROMPT, SEED = "a red circle", 5


def test_the_network_is_given_the_words_alone():
    """As its pipeline does; and a mask says which they are, whatever else stands there."""
    family = family_of("z-image")
    x = torch.randn(1, *family.shape, generator=torch.Generator().manual_seed(0))
    t, cond = times_like(0.4, x), family.encode([PROMPT])
    length = int(cond["mask"].sum())
    words = cond["prompt"][0, :length]
    with torch.no_grad():
        said = family.teacher(x, t, cond).raw
        theirs = family.pipeline.transformer(
            [x[0][:, None]], torch.tensor([0.6]), [words], return_dict=False
        )[0][0]
        deaf = family.teacher(x, t, {"prompt": cond["prompt"], "mask": torch.ones_like(cond["mask"])}).raw
    torch.testing.assert_close(said[0], -theirs[:, 0])
    assert float((deaf - said).abs().max()) > 1e-4


def test_guidance_of_one_is_the_pipelines_zero():
    family = family_of("z-image")
    assert family.stock_call(1.0)["guidance_scale"] == 0 and family.stock_call(6.0)["guidance_scale"] == 5


def test_images_need_not_be_square_and_have_sides_the_network_knows():
    ours, theirs = drawn_by_both(family_of("z-image", resolution=[32, 48]), tiny.directory("z-image"), 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for wrong, says in (
        ({"resolution": [36, 32]}, "multiples of 8"),
        ({"resolution": [1024]}, "at most 512 x 512 pixels"),
        ({"resolution": []}, "at most 512 x 512 pixels"),
        ({"max_tokens": 1024}, "positions for 992 tokens"),
    ):
        with pytest.raises(UserError, match=says):
            family_of("z-image", **wrong)


def test_a_sampler_does_not_record_what_depends_on_each_prompt():
    """Recorded with a short prompt, a long one of the same padded shape would be cut."""
    for variant in ("z-image", "lumina2"):
        family = family_of(variant)
        sampler = Sampler(family, family.teacher, tiny.directory(variant))
        longer = "a red circle above two stars"
        plain = sampler.at(1, chunk=1).x0([longer], [SEED])
        traced = sampler.trace().at(1, chunk=1)
        traced.x0(["a"], [SEED])
        torch.testing.assert_close(traced.x0([longer], [SEED]), plain)
