"""How much memory operations would take, counted on tensors that have shapes and no content (torch's "meta" device).

A step that runs on them allocates nothing, however large its networks, and every tensor it would hold is seen.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
# In the place of a network's name: gradients of parameters, which stay until the optimiser's step.
GRADIENTS = "gradients"
# What autocast runs in half precision, and what it keeps in float32, as far as networks here call it.
_HALF = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "matmul",
    "bmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
)
_FULL = ("layer_norm", "group_norm", "softmax", "mse_loss", "smooth_l1_loss", "norm")


class Ledger(TorchDispatchMode):
    """Bytes of the tensors made while it is on and still alive, by the network whose forward made them.

    Args:
        device: whose tensors count.

    Attributes:
        live: bytes now, by network; "" for all that none made: losses, gradients of activations; and GRADIENTS.
        peak: `live` when their sum was largest; passes: the largest sum without the gradients of parameters.
        flops: of products and convolutions; made: bytes of all tensors made.
        calls: passes by network, and those of them that record a graph under (name, True).
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device = META) -> None:
        super().__init__()
        self.networks, self.device = networks, device
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.passes = self.flops = self.made = 0
        self.calls: Counter[tuple[str, bool]] = Counter()
        # What lasts is no part of the count, also where a view of it is made.
        lasting = [
            tensor for network in networks.values() for tensor in (*network.parameters(), *network.buffers())
        ]
        self._seen = weakref.WeakKeyDictionary({tensor.untyped_storage(): None for tensor in lasting})
        self._inside: list[str] = []
        self._handles: list[Any] = []
        self._known = _Known(self)

    def __enter__(self) -> Ledger:
        for name, network in self.networks.items():
            before = network.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            after = network.register_forward_hook(lambda *_: self._inside.pop() and None, always_call=True)
            settled = [
                parameter.register_post_accumulate_grad_hook(self._settle)
                for parameter in network.parameters()
                if parameter.requires_grad
            ]
            self._handles += [before, after, *settled]
        self._known.__enter__()
        return super().__enter__()

    def __exit__(self, *ended: Any) -> None:
        super().__exit__(*ended)
        self._known.__exit__(*ended)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str) -> None:
        self._inside.append(name)
        self.calls[name, torch.is_grad_enabled()] += 1

    def _settle(self, parameter: Tensor) -> None:
        """A parameter has its gradient, which no pass holds."""
        storage = parameter.grad.untyped_storage()
        if isinstance(end := self._seen.get(storage), weakref.finalize) and (found := end.detach()):
            _, _, (name, size), _ = found
            self.live[name] -= size
            self.live[GRADIENTS] += size
            self._seen[storage] = weakref.finalize(storage, self._gone, GRADIENTS, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            # Whatever number it is, memory does not depend on it.
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if any(t.device == META for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            # What a foreign network keeps out of sight of `to` still has its content, which no operation here needs.
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(META), (args, kwargs))
            if kwargs.get("device") is not None:
                # To the CPU and back: nothing is there to copy.
                kwargs = kwargs | {"device": META}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size, name = storage.nbytes(), self._inside[-1] if self._inside else ""
        self._seen[storage] = weakref.finalize(storage, self._gone, name, size)
        self.live[name] += size
        self.made += size
        total = self.live.total()
        if total > self.peak.total():
            self.peak = Counter(self.live)
        self.passes = max(self.passes, total - self.live[GRADIENTS])

    def _gone(self, name: str, size: int) -> None:
        self.live[name] -= size


class _Mode(TorchFunctionMode):
    """A mode that also holds for what is computed again in a backward pass."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:
                given = dict(kwargs)
                return torch.autograd.backward(args[0], given.pop("gradient", None), **given)
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Known(_Mode):
    """What the meta device would do otherwise than a real one: attention, and reading numbers."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is nnf.scaled_dot_product_attention and not _forward_mode():
            q, k, v = _attended(*args, **kwargs)
            if q.device == META:
                # Two products, and five in backward.
                products = 2 + 5 * (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
                self.ledger.flops += products * 2 * q.numel() * k.shape[-2]
                return _Attention.apply(q, k, v)
        if func is Tensor.tolist and args[0].device == META:
            return torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu").tolist()
        return func(*args, **kwargs)


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


class _Attention(torch.autograd.Function):
    """Memory of a fused kernel: inputs, output and one number per query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _forward_mode() -> bool:
    from torch.autograd import forward_ad

    return forward_ad._current_level >= 0


class Autocast(_Mode):
    """torch.autocast's casts, which it does not make on the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        target = self.dtype if name in _HALF else torch.float32 if name in _FULL else None
        if target is not None:

            def cast(tensor: Tensor) -> Tensor:
                return (
                    tensor.to(target)
                    if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
                    else tensor
                )

            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)


def autocast(precision: str) -> contextlib.AbstractContextManager:
    """As a run of this precision casts."""
    chosen = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return Autocast(chosen[precision]) if precision in chosen else contextlib.nullcontext()


def without_content(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters and buffers have their shapes and dtypes alone."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=META), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=META)
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def counted(networks: Mapping[str, nn.Module], precision: str = "no") -> Iterator[Ledger]:
    """A `Ledger` around what is done in the block."""
    with Ledger(networks) as ledger, autocast(precision):
        yield ledger


def bytes_of(module: nn.Module, where: Callable[[nn.Parameter], bool] = lambda parameter: True) -> int:
    """Of a module's parameters, of those that `where` holds for."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if where(p))
