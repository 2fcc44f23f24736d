"""What runs of adapters over full-size networks hold, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import worlds
from models import family_of
from torch import nn

from stepdistill.denoiser import Denoiser
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.methods.base import Networks
from training.layouts import LAYOUTS, full_size

RANK = 64


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
