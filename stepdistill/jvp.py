"""Directional derivatives of a network: forward mode through any diffusers model, and differences.

Continuous-time methods (sCM, MeanFlow) need dF/dt along a trajectory, the product of a network's Jacobian
with the tangent (dx, dt). Forward mode gets it from one pass that carries the tangent beside every
activation; what it costs is about one more forward, and no graph is kept. Differences cost two ordinary
passes and work where an operation has no forward derivative (fused attention kernels, FSDP).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from stepdistill.process import Schedule, expand

DERIVATIVES = ("forward", "difference", "upwind")
# Of a difference: the share of its time's unit that a network is moved by, where a wave of one radian a unit is
# wrong by a sixth of its square; and the longest step in units of the tangent.
SHARE, LONGEST = 0.1, 1e-3


_CONVOLUTIONS = (nnf.conv1d, nnf.conv2d, nnf.conv3d)


class _OwnRules(TorchFunctionMode):
    """Forward derivatives of convolutions and group normalisation, where autograd's own do needless work.

    A convolution's second convolves the input with the weight's derivative too, which is zero here: a third of the
    whole cost. A group normalisation's is a chain of elementwise operations, and fails on what attention leaves
    transposed. Whatever carries no derivative, or whose weights do, goes the usual way.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _convolution if func in _CONVOLUTIONS else _group_norm if func is nnf.group_norm else None
        if rule is not None and args:
            value, tangent = forward_ad.unpack_dual(args[0])
            weights = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)]
            if tangent is not None and all(forward_ad.unpack_dual(x).tangent is None for x in weights):
                return forward_ad.make_dual(*rule(func, value, tangent, *args[1:], **kwargs))
        return func(*args, **kwargs)


def _convolution(
    convolve: Callable[..., Tensor], value: Tensor, tangent: Tensor, weight: Tensor, bias: Tensor | None = None,
    *args, **kwargs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear in its input: the derivative is the same convolution of the tangent, without the bias."""
    return convolve(value, weight, bias, *args, **kwargs), convolve(tangent, weight, None, *args, **kwargs)


def _group_norm(
    _func: Callable[..., Tensor], value: Tensor, tangent: Tensor, groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The Jacobian of (x - mean) / std is symmetric, so its product with the tangent is what the backward pass
    computes with the tangent in the place of the output's gradient.
    """
    value, tangent = value.contiguous(), tangent.contiguous()
    sizes = (value.shape[0], value.shape[1], value[0, 0].numel(), groups)
    normed, mean, rstd = torch.native_group_norm(value, weight, bias, *sizes, eps)
    moved, _, _ = torch.ops.aten.native_group_norm_backward(
        tangent, value, mean, rstd, None, *sizes, [True, False, False]
    )
    return normed, moved if weight is None else moved * weight.reshape(-1, *[1] * (value.ndim - 2))


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """function(*primals) and its exact derivative along `tangents`, by forward mode; both without a graph.

    Attention runs as plain math inside: no fused kernel has a forward derivative. Autocast is off, as the
    derivative of a rounded function is noise.

    Raises:
        RuntimeError: an operation of `function` has no forward derivative.
    """
    with (
        torch.no_grad(),
        in_full(primals[0]),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
        _OwnRules(),
    ):
        duals = [
            forward_ad.make_dual(p.detach().clone(), d.to(p.dtype))
            for p, d in zip(primals, tangents, strict=True)
        ]
        value, tangent = forward_ad.unpack_dual(function(*duals))
        return value, torch.zeros_like(value) if tangent is None else tangent


def in_full(like: Tensor) -> contextlib.AbstractContextManager:
    """No autocast on the device of `like`, where there is such a thing."""
    device = like.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def fine_step(native: Schedule, schedule: Schedule, t: Tensor, dt: Tensor) -> Tensor:
    """h (B,) of a difference along a tangent whose time part is dt (B,), at t (B,) of `schedule`: so short that a
    network of the schedule `native` sees its own time move by a tenth of a unit, and no longer than 1e-3.
    """
    own, moved = t, dt
    if schedule is not native:
        own = native.t_of_rho(schedule.rho(t))
        moved = dt * schedule.log_rho_rate(t) / native.log_rho_rate(own)
    return (SHARE * native.time_unit(own) / moved.abs().clamp(min=1e-12)).clamp(max=LONGEST)


def difference(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    step: float | Tensor = LONGEST,
    room: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(f(p + h d) - f(p - h d)) / 2h and the mean of the two, which is f(p) up to O(h^2).

    Both points are on the line through the primals along `tangents`: for a distilled trajectory that is the
    teacher's ODE, not re-noised data, which would add the conditional velocity's noise, and a bias under
    guidance. Both passes draw the same dropout. step: h, a number or (B,), one per sample.

    room: how far there is to go ahead and behind, (B,) each. Beyond that a network knows no time, so the two points, 2h
    apart, move away from an end together: there the difference is of first order, and as smooth as elsewhere.
    """
    far = near = step
    if room is not None:
        most_far, most_near = (each.clamp(0, None) for each in room)
        step = _like(step, most_far)
        far = torch.minimum(step + (step - most_near).clamp(0, None), most_far)
        near = torch.minimum(step + (step - most_far).clamp(0, None), most_near)
    with torch.no_grad(), in_full(primals[0]):
        with same_draws(primals[0]):
            ahead = function(
                *(p + _scaled(far, d.to(p.dtype)) for p, d in zip(primals, tangents, strict=True))
            )
        behind = function(*(p - _scaled(near, d.to(p.dtype)) for p, d in zip(primals, tangents, strict=True)))
        return (ahead + behind) / 2, _scaled(1 / (far + near), ahead - behind)


def upwind(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    step: float | Tensor = LONGEST,
) -> tuple[Tensor, Tensor]:
    """f(p) and (f(p) - f(p - h d)) / h, of first order: towards less noise, where a consistency function is
    already known (rCM, arXiv 2510.08431, takes sCM's derivative so).
    """
    with torch.no_grad(), in_full(primals[0]):
        with same_draws(primals[0]):
            here = function(*primals)
        behind = function(*(p - _scaled(step, d.to(p.dtype)) for p, d in zip(primals, tangents, strict=True)))
        return here, _scaled(1 / step, here - behind)


def directional(
    how: str,
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    step: float | Tensor = LONGEST,
    room: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`jvp` ("forward" mode), `difference` (central, but for its `room`) or `upwind`, by one of the names in `DERIVATIVES`."""
    if how == "forward":
        return jvp(function, primals, tangents)
    if how == "upwind":
        return upwind(function, primals, tangents, step)
    return difference(function, primals, tangents, step, room)


def _like(step: float | Tensor, other: Tensor) -> Tensor:
    return torch.as_tensor(step, dtype=other.dtype, device=other.device).expand_as(other)


def _scaled(by: float | Tensor, x: Tensor) -> Tensor:
    """x (B, ...) times a number, or times one per sample (B,)."""
    return x * (expand(by, x) if isinstance(by, Tensor) else by)


@contextlib.contextmanager
def same_draws(like: Tensor) -> Iterator[None]:
    """What is drawn inside, dropout, is drawn again by what comes after: the two passes of a pair are then
    one network with one mask.
    """
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        yield
