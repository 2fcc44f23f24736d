"""Qwen-Image: statistics of its latents, guidance of each token's length, times that end where its scheduler says."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import drawn_by_both, family_of

from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.families.qwen_image import QwenImage
from stepdistill.schedule import times_like

PROMPT, SEED = "a red circle", 5


def test_latents_are_normalised_by_channel_and_come_back():
    family = family_of("qwen-image")
    x0 = torch.randn(2, *family.shape)
    z = family.denormalised(x0)
    torch.testing.assert_close(z[:, 1], x0[:, 1] * 1.2 - 0.2)
    torch.testing.assert_close(family.normalised(z), x0)
    images = torch.randint(0, 256, (2, 3, *family.resolution), dtype=torch.uint8)
    pixels = (images / 127.5 - 1)[:, :, None]
    with torch.no_grad():
        expected = family.vae.encode(pixels).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(
        family.denormalised(family.encode_images(images)), expected, rtol=1e-5, atol=1e-5
    )


def test_guidance_leaves_each_token_as_long_as_the_condition_makes_it():
    family = family_of("qwen-image")
    x = torch.randn(2, *family.shape)
    t, cond, uncond = times_like([0.3, 0.9], x), family.encode([PROMPT, "two stars"]), family.uncond(2)
    with torch.no_grad():
        plain = family.teacher(x, t, cond).raw
        scales = torch.tensor([1.0, 5.0])
        raw = guided(family.teacher, x, t, cond, uncond, scales).raw
    torch.testing.assert_close(raw[0], plain[0], rtol=0, atol=1e-5)

    def lengths(raw):
        return torch.nn.functional.pixel_unshuffle(raw, 2).norm(dim=1)

    torch.testing.assert_close(lengths(raw), lengths(plain), rtol=1e-4, atol=1e-5)
    assert float((raw[1] - plain[1]).abs().max()) > 1e-3


def test_the_teachers_last_time_is_its_schedulers_terminal():
    schedule = family_of("qwen-image").schedule
    assert schedule.teacher_grid(4)[-1] == pytest.approx(0.02)
    # One step has no last time beside its first.
    assert schedule.teacher_grid(1) == (1.0,)


def test_embedded_guidance_is_refused_with_the_reason(tmp_path):
    from tiny.qwen_image import build

    build(guidance=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"guidance_embeds=true.*choose weights with guidance_embeds=false"):
        QwenImage.from_directory(tmp_path, {"resolution": [32]})


def test_images_need_not_be_square_and_have_sides_of_whole_tokens():
    ours, theirs = drawn_by_both(
        family_of("qwen-image", resolution=[32, 48]), tiny.directory("qwen-image"), 3
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 8"):
        family_of("qwen-image", resolution=[36, 32])
