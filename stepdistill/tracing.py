"""A network's operations without its Python: a quarter of a small network's batch-1 time on a CPU is diffusers' own
bookkeeping, and a trace replays the same kernels in the same order without it.

By `torch.jit.trace`, although torch deprecates it: as bit-equal as it on the embedded student, `torch.export` takes
0.91 and `torch.compile` (backend "eager") 0.83 of the plain network's time where the trace takes 0.75, and the latter
compiles for 14 seconds (benchmarks/tracing.json).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond


class Traced(nn.Module):
    """`network(x_t, t, cond, **extras)`, recorded once per shape and replayed; bit-equal to the network itself.

    For inference on fixed weights: a call that needs gradients, or one that cannot be recorded, goes to the
    network. Attention is recorded as it was at the first call, so choose its backend before.
    """

    # shapes; a server that sees more replays the latest ones.
    KEPT = 16

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self._recorded: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else (blocks, sigma_data) is the network's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training or torch.jit.is_tracing():
            return self.network(x_t, t, cond, **extras)
        names = sorted(cond) if isinstance(cond, dict) else None
        conds = () if cond is None else (cond,) if names is None else tuple(cond[name] for name in names)
        inputs = (x_t, t, *conds, *extras.values())
        plain = lambda: Positional(self.network, names, len(conds), tuple(extras)).eval()  # noqa: E731
        return self._replay(plain, inputs, (names and tuple(names), tuple(extras)))

    def _replay(
        self, plain: Callable[[], nn.Module], inputs: tuple[Tensor, ...], about: Any = None
    ) -> Tensor:
        """What `plain()` gives for inputs, from its recording; `about` is what it depends on besides their shapes."""
        key = (about, tuple((i.shape, i.dtype, i.device) for i in inputs))
        if key not in self._recorded:
            if len(self._recorded) >= self.KEPT:
                self._recorded.pop(next(iter(self._recorded)))
            # Made only here: `eval` walks through all modules of a network.
            self._recorded[key] = recording(plain(), inputs)
        return self._recorded[key](*inputs)


class TracedDecoder(Traced):
    """The same of a VAE's decoder, `network(z)`; a call with more goes to the network."""

    def forward(self, z: Tensor, *more: Any, **named: Any) -> Tensor:
        plain = torch.is_grad_enabled() or self.training or torch.jit.is_tracing()
        if plain or any(each is not None for each in (*more, *named.values())):
            return self.network(z, *more, **named)
        return self._replay(lambda: self.network, (z,))


def recording(plain: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """A recording of `plain` for inputs of these shapes; itself where none gives the same bits."""
    with warnings.catch_warnings():
        # One per Python branch on a shape; shapes are in the key.
        warnings.simplefilter("ignore")
        try:
            recorded = torch.jit.trace(plain, inputs, check_trace=False)
            if torch.equal(recorded(*inputs), plain(*inputs)):
                return recorded
        except (RuntimeError, TypeError, ValueError):
            pass
    return plain


class Positional(nn.Module):
    """The network with its condition and extras as a flat list of tensors, which is what can be recorded."""

    def __init__(self, network: nn.Module, names: list[str] | None, conds: int, extras: tuple[str, ...]):
        super().__init__()
        self.network, self.names, self.conds, self.extras = network, names, conds, extras

    def forward(self, x_t: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        cond: Cond = None
        if self.conds:
            cond = dict(zip(self.names, rest, strict=False)) if self.names else rest[0]
        return self.network(x_t, t, cond, **dict(zip(self.extras, rest[self.conds :], strict=True)))
