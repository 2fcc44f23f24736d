"""A denoiser that is another one plus low-rank updates: the base's weights are shared, never copied or changed.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds (scale / rank) up(down(x)) to chosen layers. A fake score of this
kind (SwiftBrush, VSD) holds the teacher's weights once for both, and trains a hundredth of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.denoiser import Cond, Denoiser, Overlay
from stepdistill.errors import UserError

# Layers adapted by default, by any component of their dotted name: attention in transformers and UNets, and
# the toy's MLP.
TARGETS = ("to_q", "to_k", "to_v", "to_out", "enter", "hidden", "leave")


# Adapters attached now, the innermost last.
_attached: list[LoRA] = []


@dataclass(frozen=True)
class LoraConfig:
    """Adapters in a recipe; rank 0 = none, a whole network.

    Attributes:
        rank: of the updates. alpha: they are multiplied by alpha / rank; 0 = rank, so by 1.
        targets: see `LoRA`; () = the network's own.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be 0 (none) or more, got {self.rank}.")
        if self.alpha < 0:
            raise ValueError(f"alpha must be 0 (as rank) or more, got {self.alpha:g}.")

    def __bool__(self) -> bool:
        return self.rank > 0

    def over(self, base: Denoiser) -> LoRA:
        """Raises UserError for a rank that is larger than a layer, which has no updates of such a rank."""
        adapted = LoRA(base, self.rank, self.alpha or self.rank, self.targets)
        name, least = min(adapted.ranks.items(), key=lambda each: each[1])
        if least < self.rank:
            raise UserError(
                f"a LoRA of rank {self.rank} is larger than the layer {name}, whose smaller side is {least}; ask for a rank"
                f" of at most {least}, or for targets without it."
            )
        return adapted


NO_LORA = LoraConfig()


class LoRA(Overlay):
    """`base` with adapters on its `targets`. At first it says exactly what the base says.

    Args:
        base: any denoiser; the trainer keeps it frozen and on the device.
        rank: of the updates, at most the smaller side of each layer. scale: LoRA's alpha.
        targets: components of dotted names ("to_q"); every linear or convolution layer under one is adapted.
            () = the network's `lora_targets`, or else attention.

    Raises:
        UserError: rank is below 1, or no layer of the base matches.
    """

    def __init__(self, base: Denoiser, rank: int = 64, scale: float = 108.0, targets: Sequence[str] = ()):
        super().__init__(base)
        if rank < 1:
            raise UserError(f"the rank of a LoRA must be at least 1, got {rank}.")
        targets = tuple(targets) or tuple(getattr(base.network, "lora_targets", TARGETS))
        self.rank, self.scale, self.targets = rank, scale, targets
        unheard = tuple(f"{name}." for name in getattr(base.network, "unheard", ()))
        layers = {
            name: module
            for name, module in base.network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
            and not set(targets).isdisjoint(name.split("."))
            and not f"{name}.".startswith(unheard)
        }
        if not layers:
            raise UserError(f"no linear or convolution layer of the network is called {', '.join(targets)}.")
        # Names of modules cannot hold dots.
        self.adapters = nn.ModuleDict(
            {name.replace(".", "/"): _adapter(layer, rank) for name, layer in layers.items()}
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Of each adapted layer's update: the smaller side of a layer is the most."""
        return {name.replace("/", "."): down.weight.shape[0] for name, (down, _) in self.adapters.items()}

    def clone(self) -> Denoiser:
        """Adapters of its own over the same base."""
        twin = LoRA(self.base, self.rank, self.scale, self.targets)
        twin.load_state_dict(self.state_dict())
        return twin

    def merged(self) -> Denoiser:
        """A whole denoiser of its own that says the same: W + (scale / rank) up down in place of each adapted W."""
        twin = copy.deepcopy(self.base)
        layers = dict(twin.network.named_modules())
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                weight = layers[name.replace("/", ".")].weight
                weight += (self._factor * _product(adapter)).to(weight)
        return twin

    def layers(self, prefix: str) -> dict[str, Tensor]:
        """The adapters as files of peft's kind hold them, of the layers below `prefix`, whose names begin behind it:
        "NAME.lora_A.weight" down and "NAME.lora_B.weight" up. The scale is in the latter, so alpha is the rank.
        """
        found = {}
        for name, (down, up) in self.adapters.items():
            layer = name.replace("/", ".").removeprefix(f"{prefix}.")
            found[f"{layer}.lora_A.weight"] = down.weight.detach()
            found[f"{layer}.lora_B.weight"] = self._factor * up.weight.detach()
        return {key: value.cpu().contiguous() for key, value in found.items()}

    @property
    def _factor(self) -> float:
        return self.scale / self.rank

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
        _attached.append(self)
        try:
            yield
        finally:
            _attached.pop()
            for handle in handles:
                handle.remove()

    def _hook(self, adapter: nn.Module):
        factor = self._factor

        def hook(_layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return output + factor * adapter(inputs[0].to(adapter[0].weight.dtype)).to(output.dtype)

        return hook


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`torch.utils.checkpoint` for networks that several LoRAs share: what is computed again in the backward pass is
    computed with the adapters that were attached in the forward pass, or with none, whatever is attached by then.

    For `enable_gradient_checkpointing` of diffusers' models.
    """
    adapters = _attached[-1] if _attached else None

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        again = adapters._attached() if adapters is not None else contextlib.nullcontext()
        return contextlib.nullcontext(), again

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _product(adapter: nn.Sequential) -> Tensor:
    """up down, in the shape of the adapted layer's weight."""
    down, up = adapter
    if isinstance(down, nn.Linear):
        return up.weight @ down.weight
    return torch.einsum("or,rihw->oihw", up.weight[:, :, 0, 0], down.weight)


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
