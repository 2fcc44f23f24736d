"""One optimiser per network: its own settings, clipping and learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.came import CAME, fresh
from training.recipe import OptimConfig
from training.sharding import full, sharded

if TYPE_CHECKING:
    from accelerate import Accelerator

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "radam": torch.optim.RAdam,
    "came": CAME,
}
# Those with one kernel for all parameters.
FUSED = ("adamw", "adam")


class NetworkOptimizer:
    """What trains one network.

    Args:
        module: the network; its parameters that require a gradient now are trained.
        settings: of this network, `OptimConfig.for_network`.

    Attributes:
        wrapped: the network as accelerate returns it, which synchronises processes.
    """

    def __init__(self, module: nn.Module, settings: OptimConfig, accelerator: Accelerator) -> None:
        self.settings, self.accelerator = settings, accelerator
        # A gradient scaler has to see whether a step is left out, which fused optimisers keep to themselves.
        optimizer = _optimizer(module, settings, fused=accelerator.scaler is None)
        if sharded(module):
            self.wrapped, self.optimizer = module, accelerator.prepare(optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(module, optimizer)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(self) -> float:
        """Clip the network's gradient to `max_grad_norm` and return its norm before."""
        # Of this network alone: accelerate's own clipping would unscale the others' fp16 gradients twice.
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.settings.max_grad_norm or math.inf
        return float(full(nn.utils.clip_grad_norm_(self.wrapped.parameters(), limit)))

    def step(self, step: int, total: int) -> bool:
        """Take the optimiser's step with the rate of loop iteration `step` of `total`; clears the gradient.

        The rate is a function of the recipe and the iteration alone. (A torch scheduler would put it into every
        checkpoint, where a changed recipe no longer reaches it, and takes an optimiser that sits out the first
        iterations for one that is stepped in the wrong order.)

        Returns:
            Whether the weights have moved; a gradient scaler leaves out a step that is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self.settings.lr_factor(step, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return not self.optimizer.step_was_skipped

    def leave_out(self) -> None:
        """Clear the gradient without a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """torch's, of the optimiser."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """torch's, of the optimiser."""
        self.optimizer.load_state_dict(state)


def _optimizer(module: nn.Module, settings: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters where the optimiser has one, half the time of a step and more."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    extra = {"fused": True} if fused and settings.optimizer in FUSED else {}
    if settings.optimizer != "came":
        # CAME's are its own.
        extra["eps"] = settings.eps
    return OPTIMIZERS[settings.optimizer](
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, **extra
    )


def state_bytes(module: nn.Module, optimizer: str) -> int:
    """What an optimiser of that name keeps of the parameters that require a gradient now."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if optimizer != "came":
        # Two moments.
        return sum(2 * parameter.nbytes for parameter in trained)
    return sum(kept.nbytes for parameter in trained for kept in fresh(parameter.to("meta")).values())
