"""Exponential moving averages: of a network's trainable parameters, and of a target network's.

(diffusers' `EMAModel` has no memory in its first update and rounds otherwise; torch's `AveragedModel` keeps a whole
second network. Neither gives the numbers of this one.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class EMA:
    """ema <- d ema + (1 - d) parameter, kept in float32 beside the network.

    Args:
        module: the network followed; its trainable parameters and nothing else.
        decay: the final d, in [0, 1); 0 keeps no memory (the average is the network itself).

    Attributes:
        shadow: the average by parameter name, float32, of the parameters' shapes.
        updates: n, how often it was updated.

    Raises:
        ValueError: the decay is out of its range.

    The decay in force is min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not an
    average of its initialisation.
    """

    def __init__(self, module: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.decay, self.updates = decay, 0
        self.shadow = {
            name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        parameters = dict(module.named_parameters())
        _track(self.shadow.values(), (parameters[name] for name in self.shadow), decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average into `module` for the length of the block."""
        parameters = dict(module.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        try:
            self._write(parameters, self.shadow)
            yield
        finally:
            self._write(parameters, kept)

    def put(self, module: nn.Module) -> None:
        """Put the average into `module` for good."""
        self._write(dict(module.named_parameters()), self.shadow)

    @staticmethod
    @torch.no_grad()
    def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name, and "updates", a scalar of integers."""
        return dict(self.shadow) | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`; ValueError if it is of other parameters."""
        if missing := set(self.shadow) ^ (set(state) - {"updates"}):
            raise ValueError(f"the saved average does not fit this network: {sorted(missing)[:3]} differ")
        self.updates = int(state["updates"])
        for name in self.shadow:
            # In place: the average stays on the network's device.
            self.shadow[name].copy_(state[name])


def track_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, parameter by parameter: a consistency target network."""
    _track(average.parameters(), module.parameters(), decay)


@torch.no_grad()
def _track(averages: Iterable[Tensor], parameters: Iterable[Tensor], decay: float) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter.detach().to(average.dtype), 1 - decay)
