"""Samples on disk: resumed, extended, drawn again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaluation.generate import SHARD, Configuration, generate


def configuration(**changes) -> Configuration:
    usual = {"pipeline": "student", "pipeline_sha256": "0", "protocol": "p", "steps": 1, "guidance": 1.0}
    return Configuration(**(usual | {"chunk": 50, "device": "cpu"} | changes))


def test_samples_are_resumed_extended_and_forced(tmp_path) -> None:
    asked: list[int] = []

    def sampler(prompts, seeds) -> Tensor:
        asked.extend(seeds)
        if len(asked) == 250:
            raise KeyboardInterrupt
        return torch.stack([torch.full((3, 4, 4), seed % 251, dtype=torch.uint8) for seed in seeds])

    def collect(count: int, **options) -> Tensor:
        names = [str(index) for index in range(count)]
        return torch.cat(list(generate(sampler, configuration(), names, range(count), tmp_path, **options)))

    with pytest.raises(KeyboardInterrupt):
        collect(250)
    asked.clear()
    want = torch.arange(250) % 251
    assert torch.equal(collect(200)[:, 0, 0, 0], want[:200])
    # The first shard was kept.
    assert asked == list(range(SHARD, 200))
    asked.clear()
    assert torch.equal(collect(240)[:, 0, 0, 0], want[:240])
    # The second is completed.
    assert asked == list(range(200, 240))
    asked.clear()
    assert len(collect(100)) == 100 and not asked
    assert len(collect(100, force=True)) == 100 and asked == list(range(100))
    (folder,) = tmp_path.iterdir()
    shard = folder / "0000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    asked.clear()
    assert len(collect(100)) == 100 and len(asked) == 100


def test_every_setting_has_its_own_samples() -> None:
    changes = {
        "steps": 2,
        "guidance": 2.0,
        "pipeline_sha256": "1",
        "protocol": "q",
        "chunk": 1,
        "device": "cuda",
    }
    keys = {configuration(**{name: value}).key for name, value in changes.items()}
    assert len(keys | {configuration().key}) == len(changes) + 1
