"""Frozen networks of random weights that losses look through: LPIPS on VGG16, in the layout of its authors' package, and a
DINOv2.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Outputs of VGG16's convolutions by their number among its layers, and the slice of the package each is in.
WIDTHS = {
    0: 64,
    2: 64,
    5: 128,
    7: 128,
    10: 256,
    12: 256,
    14: 256,
    17: 512,
    19: 512,
    21: 512,
    24: 512,
    26: 512,
    28: 512,
}
ENDS = (4, 9, 16, 23, 30)
HEADS = (64, 128, 256, 512, 512)


def weights() -> dict[str, Tensor]:
    """Of about the sizes that keep a picture's contrast from layer to layer."""
    generator, made, before = torch.Generator().manual_seed(0), {}, 3
    for number, width in WIDTHS.items():
        part = next(place for place, end in enumerate(ENDS, 1) if number < end)
        kernel = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        made[f"net.slice{part}.{number}.weight"] = kernel
        made[f"net.slice{part}.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    for number, width in enumerate(HEADS):
        made[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return made


def written(path: Path) -> Path:
    """A file of them; with what else the package's has."""
    save_file(weights() | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, path)
    return path


# Of the images a DINOv2 sees, in pixels.
DINO_SIDE = 28


def dino(path: Path) -> Path:
    """A directory of one, with means and deviations of its own."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}
    Dinov2Model(Dinov2Config(**sizes, image_size=DINO_SIDE, patch_size=7)).save_pretrained(path)
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(path)
    return path
