"""The Inception network of 2015 (Szegedy et al. 2015, arXiv 1512.00567) that FID is defined by.

It is the graph of TensorFlow's inception-2015-12-05 archive, which differs from torchvision's `inception_v3` in
what pools at the borders of the mixed blocks (averages don't count padding, and the last block takes a
maximum), in its 1,008 classes, and in the input's scale. Names of parameters are those of the public PyTorch
conversion `weights-inception-2015-12-05-6726825d.pth`, which therefore loads as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from stepdistill.errors import UserError

SIDE = 299
FEATURES = 2048
SPATIAL = 7 * 17 * 17
CLASSES = 1008


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True
    ):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in sides) if same else 0
        self.conv = nn.Conv2d(before, after, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, their channels concatenated in this order.

    `branches`: for each the names of its convolutions with their arguments, in sequence. A tuple of names at
    the end of a branch stands for convolutions beside each other. `pool`, "average", "maximum" or "reduce",
    comes before the branch called branch_pool; "reduce", a maximum with stride 2, has no convolution behind.
    """

    def __init__(self, branches: list[list[tuple]], pool: str):
        super().__init__()
        self.pool = pool
        self.branches: list[list[str | tuple[str, ...]]] = []
        for branch in branches:
            names: list[str | tuple[str, ...]] = []
            for step in branch:
                beside = step if isinstance(step[0], tuple) else (step,)
                for name, *arguments in beside:
                    self.add_module(name, Conv(*arguments))
                names.append(tuple(one[0] for one in beside) if isinstance(step[0], tuple) else step[0])
            self.branches.append(names)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for names in self.branches:
            y = self._pooled(x) if names[0] == "branch_pool" else x
            for name in names:
                if isinstance(name, tuple):
                    y = torch.cat([getattr(self, one)(y) for one in name], 1)
                else:
                    y = getattr(self, name)(y)
            found.append(y)
        if self.pool == "reduce":
            found.append(self._pooled(x))
        return torch.cat(found, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)


def _block_35(before: int, pooled: int) -> Mixed:
    return Mixed(
        [
            [("branch1x1", before, 64, 1)],
            [("branch5x5_1", before, 48, 1), ("branch5x5_2", 48, 64, 5)],
            [("branch3x3dbl_1", before, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)],
            [("branch_pool", before, pooled, 1)],
        ],
        "average",
    )


def _to_17(before: int) -> Mixed:
    return Mixed(
        [
            [("branch3x3", before, 384, 3, 2, False)],
            [
                ("branch3x3dbl_1", before, 64, 1),
                ("branch3x3dbl_2", 64, 96, 3),
                ("branch3x3dbl_3", 96, 96, 3, 2, False),
            ],
        ],
        "reduce",
    )


def _block_17(width: int, before: int = 768) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        [
            [("branch1x1", before, 192, 1)],
            [
                ("branch7x7_1", before, width, 1),
                ("branch7x7_2", width, width, row),
                ("branch7x7_3", width, 192, column),
            ],
            [
                ("branch7x7dbl_1", before, width, 1),
                ("branch7x7dbl_2", width, width, column),
                ("branch7x7dbl_3", width, width, row),
                ("branch7x7dbl_4", width, width, column),
                ("branch7x7dbl_5", width, 192, row),
            ],
            [("branch_pool", before, 192, 1)],
        ],
        "average",
    )


def _to_8(before: int = 768) -> Mixed:
    return Mixed(
        [
            [("branch3x3_1", before, 192, 1), ("branch3x3_2", 192, 320, 3, 2, False)],
            [
                ("branch7x7x3_1", before, 192, 1),
                ("branch7x7x3_2", 192, 192, (1, 7)),
                ("branch7x7x3_3", 192, 192, (7, 1)),
                ("branch7x7x3_4", 192, 192, 3, 2, False),
            ],
        ],
        "reduce",
    )


def _block_8(before: int, pool: str) -> Mixed:
    row, column = (1, 3), (3, 1)
    return Mixed(
        [
            [("branch1x1", before, 320, 1)],
            [
                ("branch3x3_1", before, 384, 1),
                (("branch3x3_2a", 384, 384, row), ("branch3x3_2b", 384, 384, column)),
            ],
            [
                ("branch3x3dbl_1", before, 448, 1),
                ("branch3x3dbl_2", 448, 384, 3),
                (("branch3x3dbl_3a", 384, 384, row), ("branch3x3dbl_3b", 384, 384, column)),
            ],
            [("branch_pool", before, 192, 1)],
        ],
        pool,
    )


class Inception(nn.Module):
    """Images (N, 3, 299, 299), float in 0 .. 255, to the 2,048 features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            _block_35(192, 32),
            _block_35(256, 64),
            _block_35(288, 64),
        )
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b, self.Mixed_6c = _block_17(128), _block_17(160)
        self.Mixed_6d, self.Mixed_6e = _block_17(160), _block_17(192)
        self.Mixed_7a = _to_8()
        self.Mixed_7b, self.Mixed_7c = _block_8(1280, "average"), _block_8(2048, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

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
    planes = images.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = np.stack(
        [
            np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC))
            for plane in planes
        ]
    )
    resized = torch.from_numpy(np.clip(resized, 0, 255)).to(images.device)
    return resized.unflatten(0, images.shape[:2])


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


def logits_of(weight: np.ndarray):
    """Features (N, 2048) to logits (N, 1008) without the bias, as the original Inception score has them."""
    return functools.partial(_project, weight=np.asarray(weight, np.float64))


def _project(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return rows @ weight.T
