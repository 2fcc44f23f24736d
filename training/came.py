"""CAME: an optimiser that keeps one moment in full and two as outer products (Luo et al. 2023, "CAME: Confidence-guided
Adaptive Memory Efficient Optimization", arXiv 2307.02047, Algorithm 2). SANA and SANA-Sprint are trained by it.

Of a matrix with gradient g (n, m), where a factored average of x (n, m) keeps its mean by rows r (n,) and by columns
c (m,), and stands for r c^T / mean(r), which is the paper's of sums:

    v   = factored average of g^2 + eps_1, decay beta_2
    u   = g / sqrt(v),  u^ = u / max(1, RMS(u) / d)                      clipped, d = 1
    mu  = beta_1 mu + (1 - beta_1) u^
    S   = factored average of (u^ - mu)^2 + eps_2, decay beta_3          the instability
    p   = p - lr mu / sqrt(S)                                            bold where steps agree, timid where they do not

No average is corrected for its beginning at 0, so first steps are about ten times lr: warm up. A convolution's kernel is
the matrix of its outputs by all the rest, which the paper does not say; its authors' code factors the last two dimensions,
SANA's factors kernels of 1 x 1 alone. As in both, what has less than two dimensions keeps v whole and has no S, and
decay of weights is AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Of squared gradients and of the instability, and d of the clipping: the authors' values.
EPS_1, EPS_2, THRESHOLD = 1e-30, 1e-16, 1.0
# Of the instability, where a recipe says two betas.
BETA_3 = 0.9999


class CAME(torch.optim.Optimizer):
    """Its state is tensors alone, "mu" of a parameter's shape and either "v" or the means "v_rows", "v_columns",
    "S_rows", "S_columns".

    Args:
        betas: beta_1, beta_2 and beta_3; of two the third is `BETA_3`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, ...] = (0.9, 0.999, BETA_3),
        weight_decay: float = 0.0,
    ) -> None:
        betas = (*betas, BETA_3)[:3]
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As any optimiser's of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        beta_1, beta_2, beta_3 = group["betas"]
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state.update(fresh(parameter))
        factored = parameter.ndim > 1
        average = _factored if factored else _whole
        update = gradient * average(state, "v", gradient.square() + EPS_1, beta_2)
        update /= (update.square().mean().sqrt() / THRESHOLD).clamp(min=1)
        mu = state["mu"].lerp_(update, 1 - beta_1)
        # With the new mu, as in the paper.
        step = mu * average(state, "S", (update - mu).square() + EPS_2, beta_3) if factored else mu
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])


def fresh(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter (n, ...) before its first step: of n x m values n x m + 2 (n + m), or twice as many of a
    vector.
    """
    state = {"mu": torch.zeros_like(parameter)}
    if parameter.ndim < 2:
        return state | {"v": torch.zeros_like(parameter)}
    rows, columns = parameter.shape[0], parameter[0].numel()
    for name in ("v", "S"):
        state |= {f"{name}_rows": parameter.new_zeros(rows), f"{name}_columns": parameter.new_zeros(columns)}
    return state


def _whole(state: dict[str, Tensor], name: str, values: Tensor, beta: float) -> Tensor:
    """1 / sqrt of the running mean of `values`."""
    return state[name].lerp_(values, 1 - beta).rsqrt()


def _factored(state: dict[str, Tensor], name: str, values: Tensor, beta: float) -> Tensor:
    """1 / sqrt of the factored running mean of `values`, in their shape."""
    matrix = values.flatten(1)
    rows = state[f"{name}_rows"].lerp_(matrix.mean(1), 1 - beta)
    columns = state[f"{name}_columns"].lerp_(matrix.mean(0), 1 - beta)
    return ((rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()).view_as(values)
