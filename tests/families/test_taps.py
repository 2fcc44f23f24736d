"""What discriminators see of a network: the image's features of every block, and a copy that ends in the middle."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import family_of

from stepdistill.denoiser import Denoiser, map_cond
from stepdistill.features import block_features
from stepdistill.schedule import times_like

# Diffusers adds Chroma's mask of 0 and 1 to the scores: padding is only less heard.
SOFT = ("chroma",)
PROMPTS = ["a red circle", "two small stars on blue"]


def asked(family, count=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *family.shape, generator=generator)
    t = times_like(0.6 * family.schedule.t_max, x)
    return x, t, family.encode(PROMPTS[:count])


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_every_block_gives_the_images_features(variant):
    family = family_of(variant)
    teacher, (x, t, cond) = family.teacher, asked(family)
    names = list(teacher.blocks)
    with torch.no_grad():
        features = block_features(teacher, x, t, cond, names)
    for name, tapped in zip(names, features, strict=True):
        whole = tapped.flatten(2).mT if tapped.ndim > 3 else tapped
        assert whole.shape[::2] == (2, teacher.blocks[name]), (name, tapped.shape)
        if tapped.ndim == 3:
            assert tapped.shape[1] == family.image_tokens, (name, tapped.shape)
        # Of each image its own.
        assert float((tapped[0] - tapped[1]).abs().max()) > 1e-4
    middle = teacher.middle
    with torch.no_grad():
        (half,) = block_features(teacher.encoder(), x, t, cond, [middle])
    torch.testing.assert_close(half, features[names.index(middle)], rtol=0, atol=1e-6)
    assert sum(p.numel() for p in teacher.encoder().parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_masked_padding_says_nothing_and_all_else_does(variant):
    family = family_of(variant)
    x, t, cond = asked(family)
    if not isinstance(cond, dict) or "mask" not in cond or variant in SOFT:
        pytest.skip("its padding is part of the prompt")
    padding = cond["mask"] == 0
    assert padding.any() and not padding.all()

    def said(moved: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(cond["prompt"].shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return family.teacher(x, t, cond | {"prompt": cond["prompt"] + noise * moved[..., None]}).x0

    plain = said(torch.zeros_like(padding))
    torch.testing.assert_close(said(padding), plain, rtol=0, atol=1e-6)
    assert float((said(~padding) - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_a_teacher_in_half_precision_speaks_and_its_student_is_whole(variant):
    family = family_of(variant, torch.bfloat16)
    x, t, cond = asked(family)
    assert {p.dtype for p in family.teacher.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        half = family.teacher(x, t, cond).x0
        whole = (
            family_of(variant)
            .teacher(x, t, map_cond(lambda c: c.float() if c.is_floating_point() else c, cond))
            .x0
        )
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    assert float((half - whole).norm() / whole.norm()) < 0.1
    student: Denoiser = family.teacher.clone()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())
