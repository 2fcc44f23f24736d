"""Activations of named blocks of any network, by forward hooks; no upstream forward is typed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser, is_compiled, unwrap
from stepdistill.errors import UserError


class _Enough(Exception):
    """Raised by the last tap: nothing behind it is wanted, so nothing behind it is computed."""


@contextlib.contextmanager
def tap(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the sub-modules `names` during the block, in a dict filled by each forward.

    Of a block that returns more than the image's features, such as the text's beside them, the network's
    `image_part` says which those are; without one it is the first tensor (a UNet's down block).

    Raises:
        ValueError: a name is not a sub-module; the nearest ones are listed.
        UserError: the network is compiled, and what is compiled runs no hooks.
    """
    if is_compiled(module):
        raise UserError(
            "dynamo_backend: a network whose blocks a discriminator reads cannot be compiled; launch without it"
            " (ACCELERATE_DYNAMO_BACKEND=no), or set method.gan_weight to 0 where the method has it."
        )
    collected: dict[str, Tensor] = {}
    found = submodules(module)
    for name in names:
        if name not in found:
            close = [known for known in found if known.split(".")[-1] == name.split(".")[-1]][:5]
            raise ValueError(
                f"no block {name!r} to tap in {type(unwrap(module)).__name__}; it has {', '.join(close) or 'others'}"
            )

    face, told = getattr(unwrap(module), "network", None), {}
    image_part = getattr(face, "image_part", None)

    def remember(_module: nn.Module, inputs: tuple) -> None:
        told["x_t"], told["cond"] = inputs[0], inputs[2] if len(inputs) > 2 else None

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            if image_part is not None:
                collected[name] = image_part(name, output, told["x_t"], told["cond"])
            else:
                collected[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [found[name].register_forward_hook(keep(name)) for name in names]
    if image_part is not None:
        handles.append(face.register_forward_pre_hook(remember))
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def tap_with_gradient(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """As `tap`, for one pass whose features need a graph and whose output needs none: recording stops behind
    the last of `names`, which come in forward order. What is computed later in the block has no graph either.
    """

    def stop(*_: object) -> None:
        torch.set_grad_enabled(False)

    with tap(module, names) as collected, torch.enable_grad():
        handle = submodules(module)[names[-1]].register_forward_hook(stop)
        try:
            yield collected
        finally:
            handle.remove()


def block_features(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, names: Sequence[str], **told: Tensor
) -> list[Tensor]:
    """The activations of `names` (in forward order) at (x_t, t, cond), leaving the network after the
    last one.

    Half of a UNet lies behind its middle block: a discriminator there costs half a forward and half
        a backward.
    """
    inner = unwrap(denoiser)

    def stop(*_: object) -> None:
        raise _Enough

    # An encoder's own forward comes here.
    passed = inner.whole if isinstance(inner, Encoder) else inner
    with tap(inner, names) as collected:
        handle = submodules(inner)[names[-1]].register_forward_hook(stop)
        try:
            passed(x_t, t, cond, **told)
        except _Enough:
            pass
        finally:
            handle.remove()
    return [collected[name].float() for name in names]


class Encoder(Denoiser):
    """A denoiser that ends at its middle block (`Denoiser.encoder`). Called, it gives the features of that block, (B, C, h, w)
    or (B, N, C): only what is called through its wrapper has its gradients shared between processes.
    """

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return block_features(self, x_t, t, cond, [self.middle])[0]

    def whole(self, x_t: Tensor, t: Tensor, cond: Cond) -> object:
        """A denoiser's pass, which leaves at the block that is tapped last."""
        return super().forward(x_t, t, cond)


def submodules(module: nn.Module) -> dict[str, nn.Module]:
    """By dotted name, those of a network that is held by reference (`LoRA`) as well."""
    inner = unwrap(module)
    held = getattr(inner, "network", None)
    below = held.named_modules(prefix="network") if isinstance(held, nn.Module) else ()
    return dict(inner.named_modules()) | dict(below)
