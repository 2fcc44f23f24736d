"""Networks on the CPU whose results for an image do not depend on who else is in the batch.

torch chooses the algorithm of a convolution by the size of its input, and so of the batch (NNPACK, oneDNN or a
plain product: `use_mkldnn` in ATen's Convolution.cpp), and MKL the kernel of a product by its rows; one image
alone then differs from the same image in a batch by about 1e-5. Here every convolution is oneDNN's, which
treats the images of a batch alike, and a product of fewer than `ROWS` rows is filled up. Whether that makes
two sizes of a batch equal is measured for each model (`app.models`), never assumed.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

# Of a product, from which on MKL was seen to use one kernel.
ROWS = 4


def make_invariant(*networks: nn.Module | None) -> None:
    """Change the convolutions and products of networks in place. For float32 on a CPU, and without gradients."""
    if not torch.backends.mkldnn.is_available():
        return
    for network in networks:
        for module in network.modules() if network is not None else ():
            if type(module) is nn.Conv2d and module.padding_mode == "zeros":
                if not isinstance(module.padding, str):
                    module.forward = types.MethodType(_convolve, module)
            elif type(module) is nn.Linear:
                module.forward = types.MethodType(_multiply, module)


def _convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.mkldnn_convolution(
        x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
    )


def _multiply(self: nn.Linear, x: Tensor) -> Tensor:
    if x.ndim == 2 and x.shape[0] < ROWS:
        return nnf.linear(torch.cat([x] * ROWS), self.weight, self.bias)[: x.shape[0]]
    return nnf.linear(x, self.weight, self.bias)
