"""A network that sees two times: its first part where a jump begins, its last part where it ends.

A denoiser's last part makes the answer, and its time says of which noise level. Told the end of the jump there, a trained
network is a flow map without a new weight (decoupled MeanFlow, arXiv 2510.24474); a jump of no length is the network itself.
Of a UNet the last part is what comes behind its middle; of a transformer it is the later blocks and the output layer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.jvp import in_full

if TYPE_CHECKING:
    from stepdistill.families.faces import TransformerFace

# Of a transformer's blocks, those that see where a jump begins: 20 of 28 in the authors' only published networks, SiT-XL/2
# (`--dmf-depth` of their code, kyungmnlee/dmf, which says of others: about two thirds).
FIRST = 20 / 28
# What diffusers' blocks call that which they are told of the time.
TIMES = frozenset(("timestep", "temb", "temb_mod", "temb_mod_img", "temb_mod_txt", "adaln_input"))


@contextlib.contextmanager
def second_half_at(unet: nn.Module, t: Tensor, end: Tensor, **told: Any) -> Iterator[None]:
    """Inside, up blocks of a diffusers UNet called at t (B,) are told `end` (B,) instead, both in the units of its time.

    told: what its time embedding is called with besides. What classes and sizes add to the embedding stays.
    """
    dtype = next(unet.parameters()).dtype
    with in_full(t):
        begun, ended = (unet.time_embedding(unet.time_proj(time).to(dtype), **told) for time in (t, end))
    moved = ended - begun

    def instead(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "temb" in kwargs:
            return args, kwargs | {"temb": kwargs["temb"] + moved}
        hidden, passed, embedded, *rest = args
        return (hidden, passed, embedded + moved, *rest), kwargs

    with contextlib.ExitStack() as hooks:
        for block in unet.up_blocks:
            hook = block.register_forward_pre_hook(instead, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def ends_late(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A transformer face's `forward(x_t, t, cond, **told)` that can be told `end` (B,), in the unit of t, besides.

    The network is called at `end`, where its first blocks hear of t (B,) instead: what they hear is kept from a call at t
    in which no block computes. So families say nothing of how a time gets to their blocks or to the output layer.
    """

    @functools.wraps(forward)
    def told_end(
        face: TransformerFace, x_t: Tensor, t: Tensor, cond: Cond, end: Tensor | None = None, **told: Any
    ) -> Tensor:
        if end is None:
            return forward(face, x_t, t, cond, **told)
        stacks = dict.fromkeys(face.refiners, "whole") | face.stacks
        heard = {
            stack: [_Remembering(block, where == "second") for block in face.model.get_submodule(stack)]
            for stack, where in stacks.items()
        }
        with _in_place(face.model, heard):
            forward(face, x_t, t, cond, **told)
        kept = max(1, round(FIRST * len(face.blocks)))
        for stack in face.stacks:
            heard[stack][kept:] = [each.block for each in heard[stack][kept:]]
            kept = max(0, kept - len(heard[stack]))
        with _in_place(face.model, heard):
            return forward(face, x_t, end, cond, **told)

    told_end.ends_late = True
    return told_end


class _Remembering(nn.Module):
    """A block that, called first, hands on what it is given, and from then on hears of the time that it then heard of.

    pair: whether it returns the text's states before the image's.
    """

    def __init__(self, block: nn.Module, pair: bool) -> None:
        super().__init__()
        self.block, self.pair = block, pair
        self.names = tuple(inspect.signature(type(block).forward).parameters)[1:]
        self.heard: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        # DiT's output layer embeds its time by a part of the first block.
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        told = dict(zip(self.names, args, strict=False)) | kwargs
        if self.heard is not None:
            return self.block(**(told | self.heard))
        self.heard = {name: told[name] for name in TIMES & told.keys()}
        states = told[self.names[0]]
        return (told["encoder_hidden_states"], states) if self.pair else states


@contextlib.contextmanager
def _in_place(model: nn.Module, blocks: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
    """Inside, a model's lists of blocks are these."""
    own = {stack: model.get_submodule(stack) for stack in blocks}
    try:
        for stack, each in blocks.items():
            setattr(model, stack, nn.ModuleList(each))
        yield
    finally:
        for stack, each in own.items():
            setattr(model, stack, each)
