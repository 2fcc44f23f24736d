"""LPIPS: how different two images look (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", arXiv 1801.03924, Sec. 3 and App. B), of VGG16.

    d(x, y) = sum_l mean_hw sum_c w_lc ( f_lc(x) - f_lc(y) )^2,   f_l of unit length along c at every place          (Eq. 1)

after the last ReLU of each of VGG16's five blocks. Consistency models upsample images below 256 pixels to 224 for it
(Song et al. 2023, arXiv 2303.01469; github.com/openai/consistency_models, cm/karras_diffusion.py), and on ImageNet
replace VGG16's pooling of maxima by that of means.

Weights are read from a safetensors file of one's own in the layout of the authors' package (docs/recipes.md shows how to
write one), never fetched or unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.errors import UserError, first_line
from stepdistill.jvp import in_full
from stepdistill.untrusted import readable

# Of VGG16's layers, those whose outputs are compared: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3; and their channels.
TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
# ImageNet's mean and deviation, of images in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Smaller images are resized to `side`.
LEAST = 256
# As the authors' package calls them; its numbers of VGG16's layers are torchvision's.
LAYER, HEAD = re.compile(r"net\.slice\d\.(\d+\.(?:weight|bias))"), "lin{}.model.1.weight"


class LPIPS(nn.Module):
    """Frozen, float32 whatever the precision of what calls it.

    Args:
        path: of the weights. pooling: between VGG16's blocks. side: of small images in pixels, at least 32.

    Raises:
        UserError: there is no such file, or it does not hold these weights.
    """

    def __init__(self, path: str | Path, pooling: Literal["max", "average"] = "max", side: int = 224):
        # Whose import takes long.
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.side, self.file = side, Path(path)
        layers = list(make_layers(cfgs["D"], batch_norm=False))[: max(TAPS) + 1]
        if pooling == "average":
            layers = [nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        for number, channels in enumerate(TAPS.values()):
            self.register_buffer(f"head_{number}", torch.empty(channels, 1, 1))
        self._read(self.file)
        self.eval().requires_grad_(False)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"method.lpips_weights: there is no file {path}; docs/recipes.md shows how it is written."
            )
        with readable(path, "safetensors"):
            found = load_file(path)
        named = {match[1]: value for name, value in found.items() if (match := LAYER.fullmatch(name))}
        try:
            self.layers.load_state_dict(named)
            for number in range(len(TAPS)):
                head = getattr(self, f"head_{number}")
                head.copy_(found[HEAD.format(number)].reshape(head.shape))
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"method.lpips_weights: {path} does not hold the weights of LPIPS on VGG16 ({first_line(error)});"
                " docs/recipes.md shows how it is written."
            ) from None

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> (B, channels, h, w) by `TAPS`, of unit length along the channels."""
        if images.shape[-1] < LEAST:
            images = nnf.interpolate(images, (self.side, self.side), mode="bilinear")
        x, found = (images.float() - self.mean) / self.std, []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in TAPS:
                # Whose slope is 0, not a NaN, where a place has no feature at all.
                length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
                found.append(x / (length + 1e-10))
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], not clamped, of which each may have a gradient -> distances (B,).

        Raises:
            UserError: these are no images.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                "method.distance=lpips compares images, which this family has none of; set it to l2."
            )
        with in_full(images):
            pairs = zip(self.features(images), self.features(others), strict=True)
            terms = [
                ((a - b).square() * getattr(self, f"head_{number}")).sum(1).mean((1, 2))
                for number, (a, b) in enumerate(pairs)
            ]
        return torch.stack(terms).sum(0)
