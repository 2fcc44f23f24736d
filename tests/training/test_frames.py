"""Videos as folders of frames: which frames, what is left out, and that a video teacher encodes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from examples import noise, source
from models import family_of
from PIL import Image

from stepdistill.errors import UserError
from training.encoded import Latents


def video(folder: Path, count: int, seed: int = 0, shape: tuple[int, int] = (16, 16)) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(noise(100 * seed + i, *shape)).save(folder / f"{i:03d}.png")
    return folder


def test_frames_in_order_captions_beside_and_what_is_left_out(tmp_path: Path) -> None:
    video(tmp_path / "b", 6, 1), video(tmp_path / "deep" / "a.1", 5, 2), video(tmp_path / "short", 4, 3)
    (tmp_path / "b.txt").write_text("of b\nagain")
    (tmp_path / "deep" / "a.1.caption").write_text("of a")
    (tmp_path / "short.txt").write_text("too short")
    Image.fromarray(noise(0)).save(tmp_path / "alone.png")
    for memory_gb in (1.0, 0.0):
        data = source("frames", path=tmp_path, resolution=16, frames=5, memory_gb=memory_gb)
        assert data.texts == [["of b", "again"], ["of a"]]
        assert data.counts == {
            "kept": 2, "image outside a video": 1, "video of fewer than 5 frames": 1
        }  # fmt: skip
        shown = data.images([1, 0])
        assert shown.shape == (2, 5, 16, 16, 3)
        assert np.array_equal(shown[1], np.stack([noise(100 + i) for i in range(5)]))
    assert "2 videos of 5 frames at 16x16" in data.describe()
    halved = source("frames", path=tmp_path, resolution=16, frames=3, every=2)
    assert np.array_equal(halved.images([0])[0], np.stack([noise(100 + i) for i in (0, 2, 4)]))
    (tmp_path / "b" / "002.png").write_bytes(b"?")
    assert source("frames", path=tmp_path, frames=5).counts["unreadable image"] == 1
    with pytest.raises(UserError, match="holds no folder of 7 frames"):
        source("frames", path=tmp_path, frames=7)


def test_a_video_teacher_encodes_them_in_order(tmp_path: Path) -> None:
    family = family_of("wan", frames=5)
    height, width = family.resolution
    for i in range(2):
        video(tmp_path / "videos" / str(i), 5, i, (height, width))
        (tmp_path / "videos" / f"{i}.txt").write_text("a red circle")
    data = source("frames", path=tmp_path / "videos", resolution=[height, width], frames=5)
    made = Latents(data, family.encode_images, tmp_path / "cache", family.latent_key()).fill(progress=False)
    pixels = torch.from_numpy(data.images([0, 1])).permute(0, 1, 4, 2, 3)
    expected = torch.cat([family.encode_images(each[None]) for each in pixels])
    assert made.of([0, 1]).shape == (2, *family.shape)
    assert torch.allclose(made.of([1, 0]), expected.flip(0), atol=1e-5)
    assert torch.allclose(family.examples(data, [1]), expected[1:], atol=1e-5)
