"""Latents of a data source: computed once, made again where the cache is damaged, finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples import source

from stepdistill.errors import UserError
from training.precompute import latents


def test_latents_are_computed_once(tmp_path: Path) -> None:
    scenes, calls = source("scenes", size=10), []

    def encode(images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
        calls.append(len(images))
        return images.float().mean((2, 3)).half()

    first = latents(scenes, encode, tmp_path, "vae-1", batch=4, progress=False)
    expected = torch.from_numpy(scenes.images(range(10))).float().mean((1, 2)).half()
    assert first.dtype == torch.float16 and torch.equal(first, expected) and calls == [4, 4, 2]
    assert torch.equal(latents(scenes, encode, tmp_path, "vae-1", progress=False), first) and len(calls) == 3
    latents(scenes, encode, tmp_path, "vae-2", progress=False)
    latents(source("scenes", size=10, partition="1/2"), encode, tmp_path, "vae-1", progress=False)
    assert calls[3:] == [10, 5] and len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    scenes = source("scenes", size=3)
    first = latents(scenes, lambda x: x[:, :, 0, 0].float(), tmp_path, "k", progress=False)
    (cache,) = tmp_path.iterdir()
    cache.write_bytes(cache.read_bytes()[:-4])
    assert torch.equal(latents(scenes, lambda x: x[:, :, 0, 0].float(), tmp_path, "k", progress=False), first)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="examples 0 to 2 are not finite; run the encoder in float32"):
        latents(source("scenes", size=3), lambda x: x.float() * torch.inf, tmp_path, "k", progress=False)
    assert list(tmp_path.iterdir()) == []
