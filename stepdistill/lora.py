"""A denoiser that is another one plus low-rank updates: the base's weights are shared, never copied or changed.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds (scale / rank) up(down(x)) to chosen layers. A fake score of this
kind (SwiftBrush, VSD) holds the teacher's weights once for both, and trains a hundredth of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.errors import UserError
from stepdistill.schedule import Schedule

# Layers adapted by default, by any component of their dotted name: attention in transformers and UNets, and
# the toy's MLP.
TARGETS = ("to_q", "to_k", "to_v", "to_out", "enter", "hidden", "leave")


class LoRA(Denoiser):
    """`base` with adapters on its `targets`. At first it says exactly what the base says.

    Its parameters and its state are the adapters' alone: the base is held by reference and belongs to whoever
    made it, so freezing, training, saving and moving this module never touch the base's.

    Args:
        base: any denoiser; the trainer keeps it frozen and on the device.
        rank: of the updates, at most the smaller side of each layer. scale: LoRA's alpha.
        targets: components of dotted names ("to_q"); every linear or convolution layer under one is adapted.

    Raises:
        UserError: rank is below 1, or no layer of the base matches.
    """

    def __init__(
        self, base: Denoiser, rank: int = 64, scale: float = 108.0, targets: Sequence[str] = TARGETS
    ):
        nn.Module.__init__(self)
        if rank < 1:
            raise UserError(f"the rank of a LoRA must be at least 1, got {rank}.")
        # In a list, so as not to count as this module's own parameters.
        self._base = [base]
        self.rank, self.scale, self.targets = rank, scale, tuple(targets)
        layers = {
            name: module
            for name, module in base.network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not set(targets).isdisjoint(name.split("."))
        }
        if not layers:
            raise UserError(f"no linear or convolution layer of the network is called {', '.join(targets)}.")
        # Names of modules cannot hold dots.
        self.adapters = nn.ModuleDict(
            {name.replace(".", "/"): _adapter(layer, rank) for name, layer in layers.items()}
        )

    @property
    def base(self) -> Denoiser:
        return self._base[0]

    @property
    def network(self) -> nn.Module:
        return self.base.network

    @property
    def kind(self) -> str:
        return self.base.kind

    @property
    def native(self) -> Schedule:
        return self.base.native

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def clone(self) -> Denoiser:
        """Adapters of its own over the same base."""
        twin = LoRA(self.base, self.rank, self.scale, self.targets)
        twin.load_state_dict(self.state_dict())
        return twin

    def _raw(self, x_t: Tensor, t: Tensor, cond: Cond, extras: dict[str, Tensor]) -> Tensor:
        with self._attached():
            return super()._raw(x_t, t, cond, extras)

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """The adapters act on the base for the length of the block, by hooks; outside it is itself again."""
        modules = dict(self.network.named_modules())
        handles = [
            modules[name.replace("/", ".")].register_forward_hook(self._hook(adapter))
            for name, adapter in self.adapters.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, adapter: nn.Module):
        factor = self.scale / self.rank

        def hook(_layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return output + factor * adapter(inputs[0].to(adapter[0].weight.dtype)).to(output.dtype)

        return hook


def _adapter(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """down and up, of the layer's own kind; up starts at zero."""
    if isinstance(layer, nn.Linear):
        rank = min(rank, layer.in_features, layer.out_features)
        down, up = (
            nn.Linear(layer.in_features, rank, bias=False),
            nn.Linear(rank, layer.out_features, bias=False),
        )
    else:
        rank = min(rank, layer.in_channels, layer.out_channels)
        geometry = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }
        down = nn.Conv2d(layer.in_channels, rank, bias=False, **geometry)
        up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up).to(layer.weight.device)
