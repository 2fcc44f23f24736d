"""The full-size networks of three families on the meta device, from their published configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import worlds
from models import family_of
from torch import nn

from stepdistill.denoiser import Denoiser
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.methods.base import Networks

LAYOUTS = json.loads((Path(__file__).parent / "real_layouts.json").read_text())
RANK = 64


def full_size(name: str) -> nn.Module:
    """The network on the meta device, in bfloat16."""
    import diffusers

    said = LAYOUTS[name]
    with torch.device("meta"):
        return getattr(diffusers, said["class"]).from_config(said["config"]).to(torch.bfloat16)


def every_network(nets) -> Iterator[nn.Module]:
    for module in nets.modules.values():
        yield module
        # What adapters lie over is no module of theirs.
        if hasattr(module, "base"):
            yield module.base


def held(nets) -> int:
    """Bytes of all weights, each counted once."""
    found = {
        id(p): p.numel() * p.element_size() for module in every_network(nets) for p in module.parameters()
    }
    return sum(found.values())


def adapted_layout(name: str) -> tuple[Networks, nn.Module]:
    """The networks of a DMD2 run of adapters over one full-size network, and that network."""
    model = full_size(name)
    family = family_of(LAYOUTS[name]["variant"])
    network = family.face(model)
    network.lora_targets = family.lora_targets
    family.teacher = Denoiser(network, family.kind, family.schedule).eval().requires_grad_(False)
    method = worlds.method("dmd2", fake_score_lora={"rank": RANK})
    with torch.device("meta"):
        return assemble(method, family, lora=LoraConfig(RANK), gradient_checkpointing=True), model
