"""The Inception network of 2015 (Szegedy et al. 2015, arXiv 1512.00567) that FID is defined by.

It is the graph of TensorFlow's inception-2015-12-05 archive: torchvision's `inception_v3` but for what pools at the
borders of the mixed blocks (averages don't count padding, and the last block takes a maximum), its 1,008 classes and
the input's scale. Names of parameters are those of the public PyTorch conversion
`weights-inception-2015-12-05-6726825d.pth`, which therefore loads as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.models import inception as blocks

from stepdistill.errors import UserError

SIDE = 299
FEATURES = 2048
SPATIAL = 7 * 17 * 17
CLASSES = 1008


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(blocks.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        wide = self.branch5x5_2(self.branch5x5_1(x))
        return [self.branch1x1(x), wide, double, self.branch_pool(_average(x))]


class _C(blocks.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(_average(x))]


class _E(blocks.InceptionE):
    pool = staticmethod(_average)

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        sides = (self.branch3x3_2a(single), self.branch3x3_2b(single))
        others = (self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double))
        return [self.branch1x1(x), *sides, *others, self.branch_pool(self.pool(x))]


class Inception(blocks.Inception3):
    """Images (N, 3, 299, 299), float in 0 .. 255, to the 2,048 features before the classifier."""

    def __init__(self) -> None:
        kinds = [blocks.BasicConv2d, _A, blocks.InceptionB, _C, blocks.InceptionD, _E, blocks.InceptionAux]
        super().__init__(CLASSES, aux_logits=False, inception_blocks=kinds, init_weights=False)
        self.Mixed_7c.pool = lambda x: F.max_pool2d(x, 3, stride=1, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 2048)."""
        x = self._until_6c(images)
        for name in ("6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def spatial(self, images: Tensor) -> Tensor:
        """Spatial features (N, 2023), those of sFID (Nash et al. 2021, arXiv 2103.03841) as ADM takes them: the first
        7 channels of TensorFlow's mixed_6/conv on its 17 x 17 places, place by place.
        """
        x = self.Mixed_6d.branch1x1(self._until_6c(images))[:, :7]
        return x.permute(0, 2, 3, 1).flatten(1)

    def _until_6c(self, images: Tensor) -> Tensor:
        x = (images - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], path: Path | str = "the state dict") -> Inception:
        """The network with these weights, for evaluation. Raises UserError for weights of another network."""
        net = cls()
        try:
            net.load_state_dict(dict(state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit the Inception network of 2015 ({reason}).") from None
        return net.eval().requires_grad_(False)


def tf1_bilinear(images: Tensor, side: int = SIDE) -> Tensor:
    """(N, 3, H, W) to (N, 3, side, side), float: what TensorFlow 1's resize_bilinear makes.

    Neither corners nor pixel centres are aligned (output pixel i samples at i * H / side), and there is no
    antialiasing. In the order TensorFlow computes it, columns first, so that equal input gives equal bits.
    """
    x = images.float()
    across, down = (_samples(size, side, x.device) for size in (x.shape[3], x.shape[2]))
    left, right, share = across
    top, bottom, height_share = down
    height_share = height_share.view(-1, 1)
    upper, lower = x[:, :, top], x[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * share
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * share
    return upper + (lower - upper) * height_share


def _samples(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel the two input pixels it lies between and how far along, float32."""
    at = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(
        size / side, dtype=torch.float32
    )
    low = at.long()
    return low, (low + 1).clamp_max(size - 1), at - low.float()


def clean_bicubic(images: Tensor, side: int = SIDE) -> Tensor:
    """uint8 (N, 3, H, W) to float (N, 3, side, side) in 0 .. 255: Pillow's bicubic in float, not rounded.

    The resize of clean-fid (Parmar et al. 2022, arXiv 2104.11222). Each channel of each image is resized as a
    picture of 32-bit floats, and values are clipped.
    """
    if images.shape[-2:] == (side, side):
        return images.float()
    planes = map(Image.fromarray, images.flatten(0, 1).cpu().numpy().astype(np.float32))
    resized = np.stack([np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)) for plane in planes])
    return torch.from_numpy(np.clip(resized, 0, 255)).to(images.device).unflatten(0, images.shape[:2])


def torch_bilinear(images: Tensor, side: int = SIDE) -> Tensor:
    """uint8 (N, 3, H, W) to float (N, 3, side, side) in 0 .. 256: pytorch-fid's resize and range.

    Pixel centres are aligned and nothing is antialiased; white is 256, which `Inception` takes to pytorch-fid's 1.
    """
    resized = F.interpolate(images.float() / 255, (side, side), mode="bilinear", align_corners=False)
    # A power of two, so that (256 x - 128) / 128 has the bits of 2 x - 1.
    return resized * 256


RESIZES = {
    "tf1": (tf1_bilinear, "TF1 bilinear to 299"),
    "clean": (clean_bicubic, "Pillow float bicubic to 299"),
    "pytorch": (torch_bilinear, "torch bilinear to 299, of pixels over 255"),
}


def logits_of(weight: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Features (N, 2048) to logits (N, 1008) without the bias, as the original Inception score has them."""
    return lambda rows: rows @ np.asarray(weight, np.float64).T
