"""A family of models is one file and one line in FAMILIES: a throw-away one, loaded and drawn with."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepdistill
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.base import Family
from stepdistill.schedule import Flow


class Gain(torch.nn.Module):
    """x0 = gain * x_t, whatever the time."""

    blocks, extras = {}, {}

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(gain)

    def forward(self, x_t, t, cond=None):
        return self.gain * x_t


class Gains(Family):
    name, pipelines, conditions = "gains", ("GainPipeline",), "none"
    shape, resolution, metrics = (3, 4, 4), (4, 4), {}

    def __init__(self, gain):
        self.schedule = Flow()
        self.teacher = Denoiser(Gain(gain), "x0", self.schedule)

    @classmethod
    def from_directory(cls, path, settings=None, dtype=torch.float32):
        return cls(load_file(path / "gain.safetensors")["gain"])

    def encode(self, prompts):
        return None

    def decode(self, x0):
        return x0


def test_a_new_family_is_one_line_in_the_table(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "GainPipeline"}))
    save_file({"gain": torch.tensor(2.0)}, tmp_path / "gain.safetensors")
    with pytest.raises(
        UserError, match=r"is a GainPipeline, which no family serves yet; supported are .*DDPM"
    ):
        stepdistill.load(tmp_path)
    monkeypatch.setitem(FAMILIES, "gains", f"{__name__}:Gains")
    sampler = stepdistill.load(tmp_path)
    assert (sampler.family, sampler.kind, sampler.parameters) == ("gains", "teacher", {"denoiser": 1})
    x0 = sampler.at(1, chunk=2).x0([0, 0, 0], [5, 6, 5])
    torch.testing.assert_close(x0[0], 2 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(x0[0], x0[2]) and not torch.equal(x0[0], x0[1])
