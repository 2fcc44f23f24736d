"""What a drawer gives is an image, or a sentence."""

from __future__ import annotations

import pytest
import torch

from stepdistill import load
from stepdistill.errors import UserError


def test_an_image_that_is_none_is_named_by_its_seed(tiny_sd, monkeypatch):
    sampler = load(tiny_sd)
    draw, family = sampler.at(2, chunk=2), sampler.family_
    prompts = ["a red circle"] * 3
    whole, decode = draw(prompts, [4, 5, 6]), family.decode

    def broken(x0):
        images = decode(x0)
        # Of the second chunk, whose other half is padding.
        if torch.equal(images[0], images[1]):
            images[0, 0, 0, 0] = float("nan")
        return images

    with monkeypatch.context() as patch:
        patch.setattr(family, "decode", broken)
        with pytest.raises(UserError, match=r"the image of seed 6 by .* is not finite"):
            draw(prompts, [4, 5, 6])
    assert torch.equal(draw(prompts, [4, 5, 6]), whole)
    with torch.no_grad():
        next(sampler.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"seed 4 .* float32"):
        draw(prompts, [4, 5, 6])
