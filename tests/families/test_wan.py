"""Wan's videos: their frames, sizes and schedulers."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import UniPCMultistepScheduler
from models import TOLD, drawn_by_both, family_of

from stepdistill.errors import UserError
from stepdistill.families.wan import Wan


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_videos_image_is_its_middle_frame(frames):
    family = family_of("wan", frames=frames)
    x0 = torch.randn(2, *family.shape, requires_grad=True)
    assert x0.shape == (2, 16, (frames + 3) // 4, 4, 4)
    video, image = family.frames(x0), family.decode(x0)
    assert video.shape == (2, frames, 3, 32, 32)
    torch.testing.assert_close(image, video[:, frames // 2], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(image.sum(), x0)
    assert bool(gradient.any())
    assert family.picture(x0.detach()).shape == (32, 32 * 2 * min(frames, 3), 3)


def test_videos_become_latents_and_single_images_do_only_where_a_video_is_one():
    video, image = family_of("wan"), family_of("wan", frames=1)
    pixels = torch.randint(0, 256, (2, 5, 3, 32, 32), dtype=torch.uint8)
    assert video.encode_images(pixels).shape == (2, *video.shape)
    # The first latent is that of the first frame, whatever follows.
    torch.testing.assert_close(
        video.encode_images(pixels)[:, :, :1], image.encode_images(pixels[:, 0]), rtol=0, atol=1e-5
    )
    with pytest.raises(UserError, match=r"family.frames=5: the data have 1 frame an example"):
        video.encode_images(pixels[:, 0])


def test_latents_are_normalised_by_channel_and_come_back():
    family = family_of("wan")
    z = torch.randn(2, *family.shape)
    torch.testing.assert_close(family.denormalised(family.normalised(z)), z)
    config = family.vae.config
    mean = torch.tensor(config.latents_mean).reshape(1, -1, 1, 1, 1).expand_as(z)
    assert float(family.normalised(mean).abs().max()) < 1e-6


def test_sizes_and_lengths_are_the_pipelines_or_refused():
    ours, theirs = drawn_by_both(family_of("wan", resolution=[32, 48]), tiny.directory("wan"), 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 16"):
        family_of("wan", resolution=[32, 40])
    with pytest.raises(UserError, match=r"family.frames=7: .* the nearest is 9"):
        family_of("wan", frames=7)
    family = Wan.from_directory(tiny.directory("wan"))
    assert family.resolution == (480, 832) and family.shape == (16, 21, 60, 104)


def test_two_transformers_are_refused_in_one_sentence(tmp_path):
    pipeline = family_of("wan").pipeline
    pipeline = type(pipeline)(**pipeline.components | {"transformer_2": pipeline.transformer})
    pipeline.save_pretrained(tmp_path / "wan")
    with pytest.raises(UserError, match="two transformers"):
        Wan.from_directory(tmp_path / "wan")


def test_the_published_scheduler_stands_for_the_same_flow(tmp_path):
    """Wan's is UniPC with a flow's shift."""
    pipeline = family_of("wan").pipeline
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline.save_pretrained(tmp_path / "wan")
    family = Wan.from_directory(tmp_path / "wan", {"resolution": [32], "frames": 5})
    assert family.schedule.teacher_grid(4) == family_of("wan").schedule.teacher_grid(4)


def test_states_are_zero_behind_a_prompts_end():
    cond = family_of("wan").encode(TOLD["prompt"])
    assert cond.shape == (2, 16, 32) and not cond[:, -1].any() and bool(cond[:, 0].any())
