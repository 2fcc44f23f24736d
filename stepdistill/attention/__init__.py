"""Which attention kernel a pipeline's denoiser runs, chosen and then proved.

`choose(pipeline, "auto")` picks the fastest backend that runs here, sets it layer by layer, and accepts it
only after every attention layer was run once on random input, was *seen* to call that backend, and agreed
with plain math.

Why not `model.set_attention_backend(name)`: in diffusers 0.42 it changes nothing for processors that do
not read `_attention_backend` (UNet2DModel, UNet2DConditionModel, DiT, Sana, SD3), and it flips a
process-wide default that `reset_attention_backend` does not restore. Here each layer's own processor is
set and nothing else.

| name     | what runs                                                              | where it can   |
|----------|------------------------------------------------------------------------|----------------|
| xformers | xformers.ops.memory_efficient_attention                                | CUDA           |
| flash    | F.scaled_dot_product_attention, pinned to its flash kernel             | CUDA half, CPU |
| sdpa     | F.scaled_dot_product_attention, kernel picked by torch ("native")      | anywhere       |
| math     | softmax(q k^T / sqrt(d)) v, written out                                | anywhere       |
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.errors import UserError, nearest

BACKENDS = ("auto", "xformers", "flash", "sdpa", "native", "math")

# Largest |difference| from math allowed, relative to max(1, |math|). float32 kernels differ by summation
# order only; bfloat16 has 8 bits of mantissa, and 2e-2 is about five of its roundings.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class AttentionReport:
    """What is in effect: `layers` of the denoiser's `total` attention layers run `name`; `why` is proof."""

    name: str
    layers: int
    total: int
    why: str

    def __str__(self) -> str:
        return f"attention: {self.name} ({self.layers}/{self.total} layers)"


def choose(pipeline: Any, requested: str = "auto") -> AttentionReport:
    """Set an attention backend on the denoiser of `pipeline` and prove that it is in effect.

    Args:
        pipeline: a diffusers pipeline (its `unet` or `transformer` is used), or such a network itself.
        requested: one of `BACKENDS`. "auto" is xformers, else flash, on CUDA in half precision, and sdpa
            otherwise; "native" is another name for sdpa.

    Raises:
        UserError: the name is unknown, or a backend asked for by name cannot run here or disagrees with math.
            Nothing is left changed then. "auto" moves on to the next candidate instead and says so in `why`.
    """
    if requested not in BACKENDS:
        raise UserError(
            f"attention={requested!r} is not a backend; choose one of {', '.join(BACKENDS)}."
            f"{nearest(requested, BACKENDS)}"
        )
    layers = list(_attention_layers(_denoiser(pipeline)))
    if not layers:
        return AttentionReport("none", 0, 0, "the denoiser has no attention layers")
    weight = layers[0].to_q.weight
    if requested != "auto":
        candidates = ("sdpa",) if requested == "native" else (requested,)
    elif weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16):
        candidates = ("xformers", "flash", "sdpa")
    else:
        candidates = ("sdpa",)

    found = [layer.processor for layer in layers]
    refused = []
    try:
        expected = _run(layers, "math")
        for name in candidates:
            _restore(layers, found)
            try:
                return _accept(layers, name, expected, refused)
            except _CannotRun as error:
                refused.append(f"{name}: {error}")
    except BaseException:
        _restore(layers, found)
        raise
    _restore(layers, found)
    if requested == "auto":
        raise UserError(
            f"no attention backend runs here ({'; '.join(refused)}); try another device or dtype."
        )
    raise UserError(
        f"attention={requested} cannot run on {weight.device.type} in "
        f"{str(weight.dtype).removeprefix('torch.')} ({refused[0].split(': ', 1)[1]}); use attention=auto."
    )


class _CannotRun(Exception):
    """A backend is missing, fails, is not in effect, or is wrong. The message is a clause."""


def _denoiser(pipeline: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return getattr(pipeline, name)
    if isinstance(pipeline, nn.Module):
        return pipeline
    raise UserError(f"{type(pipeline).__name__} has no unet or transformer to set attention on.")


def _attention_layers(network: nn.Module) -> Iterator[nn.Module]:
    """The attention modules of diffusers: they have a `processor` and project with `to_q`."""
    for module in network.modules():
        if hasattr(module, "processor") and isinstance(getattr(module, "to_q", None), nn.Module):
            yield module


def _restore(layers: list[nn.Module], processors: list[Any]) -> None:
    for layer, processor in zip(layers, processors, strict=True):
        layer.set_processor(processor)


# Setting a backend ------------------------------------------------------------------------------------------


def _set(layer: nn.Module, name: str) -> bool:
    """Give one layer the processor of backend `name`; False when its kind of attention has none.

    Each processor kind is replaced by its own sibling, so masks, added keys and residuals stay as they were.
    """
    from diffusers.models import attention_processor as p
    from diffusers.models.attention_dispatch import AttentionBackendName as Dispatch

    plain = (p.AttnProcessor, p.AttnProcessor2_0, p.XFormersAttnProcessor)
    added = (p.AttnAddedKVProcessor, p.AttnAddedKVProcessor2_0, p.XFormersAttnAddedKVProcessor)
    joint = (None, p.JointAttnProcessor2_0, p.XFormersJointAttnProcessor)
    old = layer.processor
    old = getattr(old, "_unpinned", old)

    if hasattr(old, "_attention_backend"):
        new = copy.copy(old)
        new._attention_backend = {
            "sdpa": Dispatch.NATIVE,
            "math": Dispatch._NATIVE_MATH,
            "flash": Dispatch._NATIVE_FLASH,
            "xformers": Dispatch.XFORMERS,
        }[name]
        layer.set_processor(new)
        return True
    for math, sdpa, xformers in (plain, added, joint):
        if type(old) not in (math, sdpa, xformers):
            continue
        if name == "xformers":
            _need_xformers(layer)
            layer.set_processor(xformers())
        elif name == "math" and math is not None:
            layer.set_processor(math())
        else:
            layer.set_processor(sdpa() if name == "sdpa" else _pinned(sdpa(), _KERNELS[name]))
        return True
    if name == "xformers":
        return False
    layer.set_processor(old if name == "sdpa" else _pinned(old, _KERNELS[name]))
    return True


_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def _need_xformers(layer: nn.Module) -> None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        raise _CannotRun("the package xformers is not installed") from None
    if layer.to_q.weight.device.type != "cuda":
        raise _CannotRun("its kernels are for CUDA only")


def _pinned(processor: Any, kernel: SDPBackend) -> Any:
    """A copy of `processor` whose scaled_dot_product_attention may use `kernel` only, or fails.

    torch keeps the allowed kernels in process-wide flags, so two threads must not run networks at the same
    time; the app has one worker thread, training one process per device.
    """
    kind = type(processor)

    class Pinned(kind):
        # `wraps` keeps the signature: Attention.forward reads it to decide which keyword arguments to pass
        # on.
        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(kernel):
                return kind.__call__(self, *args, **kwargs)

    Pinned.__name__ = f"{kind.__name__}[{kernel.name}]"
    pinned = copy.copy(processor)
    pinned.__class__ = Pinned
    pinned._unpinned = processor
    return pinned


# Proving it -------------------------------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Counts calls of F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.sdpa = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sdpa += getattr(func, "__name__", "") == "scaled_dot_product_attention"
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """Collects the names of fused attention operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().lower()
        if any(word in name for word in ("attention", "flash", "fmha")):
            self.fused.add(func.name().split("::")[-1].split(".")[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Seen:
    """One layer's run: its outputs, how often it called SDPA, which fused operators ran, and whether it
    was set.
    """

    outputs: tuple[Tensor, ...]
    sdpa: int
    fused: frozenset[str]
    was_set: bool

    def in_effect(self, name: str) -> bool:
        """Whether backend `name` is what ran, judged by what was called and not by what was set."""
        if not self.was_set:
            return False
        if name == "xformers":
            return bool(self.fused) and not self.sdpa
        if name == "flash":
            return self.sdpa > 0 and any("flash" in op for op in self.fused)
        if name == "math":
            return not self.fused
        return self.sdpa > 0


@torch.no_grad()
def _run(layers: list[nn.Module], name: str) -> list[_Seen]:
    """Set backend `name` on every layer and run each once on the same seeded input, (1, 64, C) beside (1,
    20, C').
    """
    seen = []
    for layer in layers:
        was_set = _set(layer, name)
        hidden, context = _inputs(layer)
        training = layer.training
        layer.eval()
        try:
            with _Calls() as calls, _Kernels() as kernels:
                outputs = layer(hidden) if context is None else layer(hidden, encoder_hidden_states=context)
        except Exception as error:
            # Kernels report what they lack in many exception types and many lines; one line is enough for a
            # reader.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _CannotRun(reason) from error
        finally:
            layer.train(training)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = tuple(out for out in outputs if out is not None)
        seen.append(_Seen(outputs, calls.sdpa, frozenset(kernels.fused), was_set))
    return seen


def _inputs(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = layer.to_q.weight
    width = layer.to_q.in_features
    generator = torch.Generator().manual_seed(0)

    def noise(tokens: int, channels: int) -> Tensor:
        return torch.randn(1, tokens, channels, generator=generator).to(weight)

    hidden = noise(64, width)
    if isinstance(getattr(layer, "add_k_proj", None), nn.Module):
        return hidden, noise(20, layer.add_k_proj.in_features)
    if isinstance(getattr(layer, "to_k", None), nn.Module) and getattr(layer, "is_cross_attention", False):
        return hidden, noise(20, layer.to_k.in_features)
    return hidden, None


def _accept(layers: list[nn.Module], name: str, expected: list[_Seen], refused: list[str]) -> AttentionReport:
    """Run backend `name`; return its report, or raise `_CannotRun` when it is wrong or nowhere in effect."""
    got = _run(layers, name)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            # `not <=` below also refuses NaN, which every comparison calls false.
            worst = max(worst, _difference(x, y), key=lambda v: float("inf") if v != v else v)
    bound = TOLERANCE.get(expected[0].outputs[0].dtype, 2e-2)
    if not worst <= bound:
        raise _CannotRun(f"its output differs from plain math by {worst:.1e}, more than {bound:.0e}")
    effective = sum(seen.in_effect(name) for seen in got)
    if not effective:
        kinds = sorted({type(layer.processor).__name__ for layer in layers})
        raise _CannotRun(f"no layer calls it; the processors are {', '.join(kinds)}")

    kernels = Counter(op for seen in got for op in seen.fused)
    ran = ", ".join(f"{op} x{n}" for op, n in sorted(kernels.items())) or "no fused kernel"
    why = f"{ran}; max difference from math {worst:.1e}"
    others = sorted(
        {
            type(layer.processor).__name__
            for layer, s in zip(layers, got, strict=True)
            if not s.in_effect(name)
        }
    )
    if others:
        why += f"; the others keep {', '.join(others)}"
    if refused:
        why += f"; refused {'; '.join(refused)}"
    return AttentionReport(name, effective, len(layers), why)


def _difference(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float((x - y).abs().max() / y.abs().max().clamp(min=1.0))
